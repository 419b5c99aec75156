"""What a compiled update costs: seconds by layer part, collectives, kernels, and the share of the chip's peak."""

import collections
import dataclasses
from typing import Any

from jax.sharding import Mesh

from jaxtune.common import console
from jaxtune.common.formatting import amount, short_time, size
from jaxtune.cost import Chip, Estimate, chip_of, estimate, hlo
from jaxtune.models import Model

_COSTS = 10  # that are listed


@dataclasses.dataclass(frozen=True)
class Speed:
    """An update's estimated speed.

    Attributes:
      chip: what it runs on.
      estimate: of the program.
      tokens: of an update, all devices together.
      flops: that an update needs on one device, masked scores left out.
    """

    chip: Chip
    estimate: Estimate
    tokens: int
    flops: float

    @property
    def mfu(self) -> float:
        """Share of the chip's peak."""
        return self.flops / self.estimate.seconds / self.chip.peak

    def metrics(self) -> dict[str, float]:
        """For `result.json`."""
        seconds = self.estimate.seconds
        return {
            'estimated_seconds': round(seconds, 6),
            'estimated_mfu': round(self.mfu, 4),
            'estimated_tokens_per_second': round(self.tokens / seconds, 1),
        }

    def details(self) -> dict[str, Any]:
        """For `compile.json`."""
        total = self.estimate.seconds
        costs = [
            {'part': part, 'phase': phase, 'seconds': seconds, 'share': seconds / total}
            for (part, phase), seconds in self.estimate.parts.items()
        ]
        return {
            'costs': costs,
            'blocking_seconds': self.estimate.blocking_seconds,
            'hidden_seconds': self.estimate.hidden_seconds,
            'collectives': by_kind(self.estimate),
            'kernels': [dataclasses.asdict(kernel) for kernel in self.estimate.kernels],
            'chip': dataclasses.asdict(self.chip),
        }

    def facts(self) -> list[tuple[str, str]]:
        """Lines for the terminal."""
        total = self.estimate.seconds
        listed = list(self.estimate.parts.items())[:_COSTS]
        return [
            (
                'estimate',
                f'{short_time(total)} an update, {amount(self.tokens / total)}tokens/s, {self.mfu:.0%} of peak',
            ),
            ('costs most', ', '.join(f'{part} {phase} {seconds / total:.0%}' for (part, phase), seconds in listed)),
            (
                'kernels',
                ', '.join(f'{one.count} {one.name} {short_time(one.seconds)}' for one in self.estimate.kernels),
            ),
            ('collectives', _links(self.estimate)),
        ]


def measure(text: str, mesh: Mesh, model: Model, length: int, tokens: int, flops: float) -> Speed | None:
    """Estimates an update from its program; says so in a line where that cannot be done.

    Args:
      text: of the compiled program.
      mesh: that it was compiled for.
      model: that it trains.
      length: tokens of a row.
      tokens: of an update, all devices together.
      flops: of an update, all devices together, masked scores left out.
    """
    device = mesh.devices.flat[0]
    if not text:
        return None
    chip = chip_of(device)
    if chip is None:
        console.note(f'speed: not estimated: the figures of {device.device_kind} are not known')
        return None
    seen = model.pairs_seen(length, mesh.shape['sequence'])
    estimated = estimate(hlo.parse(text), chip, dict(mesh.shape), seen)
    if estimated is None:
        console.note("speed: not estimated: the compiler's text holds no cycles")
        return None
    return Speed(chip, estimated, tokens, flops / mesh.size)


def by_kind(estimated: Estimate) -> dict[str, dict[str, Any]]:
    """The collectives of an update by kind: how often, the largest, bytes by axes, seconds waiting and hidden."""
    kinds: dict[str, dict[str, Any]] = {}
    for one in estimated.collectives:
        entry = kinds.setdefault(
            one.kind,
            {'count': 0, 'largest': one.largest, 'bytes': {}, 'blocking_seconds': 0.0, 'hidden_seconds': 0.0},
        )
        entry['count'] += one.count
        entry['bytes'][one.axes] = entry['bytes'].get(one.axes, 0.0) + one.nbytes
        entry['hidden_seconds' if one.hidden else 'blocking_seconds'] += one.seconds
    return kinds


def _links(estimated: Estimate) -> str:
    """Bytes by axes of the mesh, and what of their time is waited for."""
    counted: dict[tuple[str, str], float] = collections.defaultdict(float)
    for one in estimated.collectives:
        counted[one.kind, one.axes] += one.nbytes
    listed = [f'{kind} {size(nbytes)} over {axes}' for (kind, axes), nbytes in counted.items() if axes and nbytes > 1e6]
    if not listed:
        return ''
    times = (('waited for', estimated.blocking_seconds), ('beside other work', estimated.hidden_seconds))
    return f'{", ".join(listed)}; ' + ', '.join(f'{short_time(n)} {words}' for words, n in times if n)
