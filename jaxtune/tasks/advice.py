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
      peak_bytes: what a device needs; what it needs at least where it was not compiled.
      limit: what a device has.
      devices: how many there are.
      compiled: whether the compiler said so; without, the state alone is too large, or there was a problem.
      least_bytes: of state, gradients and batch.
      accumulate: micro-batches an update.
      mesh: in words.
      seconds: estimated, of an update; 0 where that is not known.
      tokens_per_second: of all devices.
      mfu: share of the chips' peak.
      problem: why there is no program; '' where there is one.
    """

    fits: bool
    peak_bytes: int
    limit: int
    devices: int
    compiled: bool
    least_bytes: int = 0
    accumulate: int = 1
    mesh: str = ''
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    mfu: float = 0.0
    problem: str = ''


class Trial:
    """Tries a recipe with changes, and remembers what a step needed beside its state.

    Args:
      least: `changes -> bytes` of state, gradients and batch on a device, and what it has; without compiling.
      compile: `changes -> Outcome`.
      outcome: of the recipe without changes.
    """

    def __init__(
        self, least: Callable[[Changes], tuple[int, int]], compile: Callable[[Changes], Outcome], outcome: Outcome
    ) -> None:
        self._least, self._compile = least, compile
        self._beside = outcome.peak_bytes - outcome.least_bytes if outcome.compiled else 0

    def __call__(self, changes: Changes, share: float = 1.0) -> Outcome | None:
        """The outcome; None where it cannot be, or cannot fit by what others needed, of which it needs a share."""
        try:
            least, limit = self._least(changes)
            # What others needed beside their state is a hint alone: the last word is the compiler's.
            if least + _HINT * self._beside * share > limit:
                return None
            outcome = self._compile(changes)
        except UserError:  # settings that do not go together
            return None
        if outcome.compiled and not outcome.fits and share == 1:
            self._beside = max(self._beside, outcome.peak_bytes - outcome.least_bytes)
        return outcome


_SHORTEST = 512  # tokens of a row that a shorter length goes down to
_HINT, _KEPT = 0.8, 0.3


def nearest(config: Settings, outcome: Outcome, attempt: Trial) -> tuple[Changes, Outcome] | None:
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
        found = attempt(choice, _share(config, choice))
        if found is not None and found.fits:
            return choice, found
    return None


def _share(config: Settings, changes: Changes) -> float:
    """About what share of its activations a step keeps with changes."""
    share = changes.get('data.seq_len', config.data.seq_len) / config.data.seq_len
    if 'train.accumulate' in changes or 'mesh.sequence' in changes:
        share /= 2
    return share * _KEPT if 'model.remat' in changes else share


def _changes(config: Settings, outcome: Outcome) -> Iterator[Changes]:
    """What makes a step smaller, what costs least first.

    Offloading the optimizer's state is not among them: a step brings all of it to the device.
    """
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
    if model.remat != 'offload':
        yield {'model.remat': 'offload'}
    if outcome.devices > 1 and config.mesh.sequence == 1 and not config.mesh.auto:
        yield {'mesh.sequence': 2}
    length = config.data.seq_len // 2
    while length >= _SHORTEST:
        yield {'data.seq_len': length}
        length //= 2
