"""What `task=compile` found: memory and time of an update as stacks, collectives as a table."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from jaxtune.common.formatting import short_time, size
from jaxtune.report.source import Source
from jaxtune.report.stack import Slice, cut

_HUES = ('step', 'eval-phase', 'data', 'compile', 'checkpoint', 'load', 'export')
_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Costs:
    """An update on hardware that need not be there.

    Attributes:
      verdict: whether it fits, in a sentence.
      memory: of a device.
      time: of an update; empty where it is not estimated.
      links: collectives: kind, axes, number, bytes a device sends, time.
    """

    verdict: str
    memory: list[Slice]
    time: list[Slice]
    links: list[tuple[str, str, str, str, str]]


def of(source: Source) -> Costs | None:
    """The costs of a run of `task=compile`; None of other runs."""
    compiled = source.compiled
    needed, limit = compiled.get('peak_bytes_per_device'), compiled.get('available_bytes')
    if not isinstance(needed, int) or not isinstance(limit, int):
        return None
    fits = 'fits' if compiled.get('fits') else 'does not fit'
    mesh = ' x '.join(f'{name} {n}' for name, n in (compiled.get('mesh') or {}).items() if n > 1) or 'one device'
    verdict = f'On {compiled.get("device_kind")} ({mesh}) it {fits}: {size(needed)} of {size(limit)} a device.'
    return Costs(verdict, _memory(compiled, needed, limit), _time(compiled), _links(compiled))


def _memory(compiled: Mapping[str, Any], needed: int, limit: int) -> list[Slice]:
    argument = compiled.get('argument_bytes', 0)
    parts = [
        ('weights, state and batch', 'step', argument),
        ('temporaries', 'eval-phase', needed - argument),
        ('free', 'other', limit - needed),
    ]
    whole = max(needed, limit)
    return [cut(words, color, size(n), n / whole) for words, color, n in parts if n > 0]


def _time(compiled: Mapping[str, Any]) -> list[Slice]:
    total = compiled.get('estimated_seconds')
    if not total:
        return []
    costs, blocking = compiled.get('costs') or [], compiled.get('blocking_seconds', 0.0)
    shown = [(f'{cost["part"]}, {cost["phase"]}', cost['seconds']) for cost in costs[:_SHOWN]]
    shown += [('waiting for other devices', blocking)] if blocking > 0.001 * total else []
    rest = total - sum(seconds for _, seconds in shown)
    hues = itertools.cycle(_HUES)
    slices = [cut(words, next(hues), short_time(seconds), seconds / total) for words, seconds in shown]
    return [*slices, cut('everything else', 'other', short_time(rest), rest / total)] if rest > 0 else slices


def _links(compiled: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for kind, entry in (compiled.get('collectives') or {}).items():
        waited, hidden = entry['blocking_seconds'], entry['hidden_seconds']
        time = f'{short_time(waited)} waited for' if waited else f'{short_time(hidden)} beside other work'
        if waited and hidden:
            time += f', {short_time(hidden)} beside other work'
        for axes, nbytes in entry['bytes'].items():
            rows.append((kind, axes, f'{entry["count"]:,}', size(nbytes), time))
    return rows
