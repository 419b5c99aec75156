"""A trace of some updates by JAX's profiler."""

import pathlib
from collections.abc import Callable

import jax

from jaxtune.common import console

FOLDER = 'profile'


def bounds(text: str) -> tuple[int, int] | None:
    """First and last update of `log.profile`, such as `10:15`, which the schema has checked; None for ''."""
    first, colon, last = text.partition(':')
    return (int(first), int(last)) if colon else None


class Profile:
    """Traces the updates from `first` to `last`, both included; waits for the devices at its two ends alone.

    Every process writes what its own host and devices did, several of them into a folder each.

    Args:
      first, last: the updates; a run that goes on after `first` traces the rest of them.
      folder: where to write.
    """

    def __init__(self, first: int, last: int, folder: pathlib.Path) -> None:
        self.first, self.last, self.folder = first, last, folder
        if jax.process_count() > 1:
            self.folder = folder / f'process-{jax.process_index()}'
        self._seen = False  # any update
        self._from = 0  # the first that is in the trace that goes on now; 0 = none does

    def before(self, step: int, flush: Callable[[], None]) -> None:
        """Starts before the first of them; `flush` waits for the updates that have begun."""
        if step > self.last and not self._seen:
            console.note(f'no profile of updates {self.first} to {self.last}: this run goes on at update {step}')
        self._seen = True
        if self.first <= step <= self.last and not self._from:
            flush()
            self.folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self._from = step

    def after(self, step: int, flush: Callable[[], None]) -> None:
        """Stops after the last of them."""
        if step == self.last and self._from:
            flush()
            self.stop(step)

    def stop(self, step: int) -> None:
        """Writes the trace, if one goes on, that ends with this update; says where it is."""
        if not self._from:
            return
        first, self._from = self._from, 0
        jax.profiler.stop_trace()
        found = max(self.folder.glob('plugins/profile/*/perfetto_trace.json.gz'), key=lambda path: path.stat().st_mtime)
        console.note(
            f'profile of updates {first} to {step}: {found}, which https://ui.perfetto.dev opens; or '
            f'`tensorboard --logdir {self.folder}` with xprof'
        )
