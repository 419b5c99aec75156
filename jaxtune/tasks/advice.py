"""For a step that does not fit: the nearest settings that do, each compiled."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxtune.common.settings import Settings
from jaxtune.errors import UserError
from jaxtune.parallel.topology import larger

Changes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a cell of the table.

    Attributes:
      fits: whether a device holds it.
      peak_bytes: what a device needs; a lower bound where it was not compiled.
      limit: what a device has.
      devices: how many there are.
      compiled: whether the compiler said so; without, the state alone is too large.
      accumulate: micro-batches an update.
      mesh: in words.
      seconds: estimated, of an update; 0 where that is not known.
      tokens_per_second: of all devices.
      mfu: share of the chips' peak.
    """

    fits: bool
    peak_bytes: int
    limit: int
    devices: int
    compiled: bool
    accumulate: int = 1
    mesh: str = ''
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    mfu: float = 0.0


# Compiles a recipe with changes, or finds without that its state is too large.
Try = Callable[[Changes], Outcome]

_SHORTEST = 512  # tokens of a row that a shorter length goes down to


def nearest(config: Settings, outcome: Outcome, attempt: Try) -> tuple[Changes, Outcome] | None:
    """The fewest changes with which a step fits, the cheapest first; None where none was found.

    First each change on its own, then one after the other together, at last a larger machine.

    Args:
      config: the recipe of what does not fit.
      outcome: of it.
      attempt: tries the recipe with changes.
    """
    single = list(_changes(config, outcome))
    together = [dict(pair) for pair in itertools.accumulate(single, lambda before, change: {**before, **change})]
    machines = [{'compile.topology': name} for name in larger(config.compile.topology)]
    for choice in (*single, *together[1:], *machines):
        try:
            found = attempt(choice)
        except UserError:  # settings that do not go together
            continue
        if found.fits:
            return choice, found
    return None


def _changes(config: Settings, outcome: Outcome) -> Iterator[Changes]:
    """What makes a step smaller, what costs least first."""
    model, method = config.model, config.method.name
    if model.compute_dtype != 'bfloat16':
        yield {'model.compute_dtype': 'bfloat16'}
    if model.param_dtype != 'bfloat16':
        yield {'model.param_dtype': 'bfloat16'}
    if model.remat in ('none', 'dots'):
        yield {'model.remat': 'full'}
    rows = config.train.batch_size // outcome.devices
    if config.train.accumulate != 'auto' and config.train.accumulate < rows:
        yield {'train.accumulate': rows}
    if outcome.devices > 1 and config.mesh.fsdp not in (-1, outcome.devices) and not config.mesh.auto:
        yield {'mesh.fsdp': outcome.devices}
    if method == 'lora':
        yield {'method.name': 'qlora'}
    if config.optimizer.name == 'adamw' and method == 'full':
        yield {'optimizer.name': 'adamw8bit'}
    if not config.optimizer.offload and method == 'full':
        yield {'optimizer.offload': True}
    if outcome.devices > 1 and config.mesh.sequence == 1 and not config.mesh.auto:
        yield {'mesh.sequence': outcome.devices, 'mesh.fsdp': 1}
    if model.remat != 'offload':
        yield {'model.remat': 'offload'}
    length = config.data.seq_len // 2
    while length >= _SHORTEST:
        yield {'data.seq_len': length}
        length //= 2
