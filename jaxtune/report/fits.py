"""What fits where, as `task=compile` found for several topologies, methods and lengths: a table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtune.common.formatting import amount, short_time, size
from jaxtune.report.source import Source


@dataclasses.dataclass(frozen=True)
class Row:
    """A cell of the table, in words.

    Attributes:
      hardware: the topology's name.
      method: of tuning.
      length: of a row, in tokens.
      memory: needed, of what there is.
      share: of a device's memory; over 1 where it does not fit.
      fits: whether it does.
      speed: tokens a second and the share of the peak, '' where not estimated.
      update: seconds of an update, '' where not estimated.
      advice: settings with which it fits, memory and speed with them; '' where it fits or none were found.
    """

    hardware: str
    method: str
    length: str
    memory: str
    share: float
    fits: bool
    speed: str
    update: str
    advice: str


def table(source: Source) -> list[Row]:
    """The rows of a run that compiled a table; none of other runs."""
    return [_row(cell) for cell in source.compiled.get('cells') or ()]


def _row(cell: Mapping[str, Any]) -> Row:
    speed = f'{_rate(cell)}, {cell["mfu"]:.0%} of the peak' if cell['tokens_per_second'] else ''
    update = short_time(cell['seconds']) if cell['seconds'] else ''
    advice = advised(cell) if cell.get('advice') else ''
    hardware, share = cell['topology'] or 'this machine', cell['peak_bytes'] / cell['limit']
    length = f'{cell["seq_len"]:,}'
    return Row(hardware, cell['method'], length, memory(cell), share, cell['fits'], speed, update, advice)


def advised(cell: Mapping[str, Any]) -> str:
    """The advice of a cell in words: settings, memory, speed."""
    found = cell['advice']
    settings = ' '.join(f'{key}={value}' for key, value in found['changes'].items())
    return f'{settings}: {memory(found)}' + (f', {_rate(found)}' if found['tokens_per_second'] else '')


def memory(cell: Mapping[str, Any]) -> str:
    """What a device needs of what it has, in words; at least, where it was not compiled."""
    return f'{"" if cell["compiled"] else "at least "}{size(cell["peak_bytes"])} of {size(cell["limit"])}'


def _rate(cell: Mapping[str, Any]) -> str:
    return f'{amount(cell["tokens_per_second"])} tokens/s'
