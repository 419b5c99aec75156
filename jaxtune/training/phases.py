"""Where a run's time goes."""

import contextlib
import threading
import time
from collections.abc import Collection, Iterator

import jax

_COMPILED = '/jax/core/compile/backend_compile_duration'


class PhaseTimer:
    """Seconds by phase.

    Attributes:
      phases: seconds of each.
      started: when it was made, by `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.started = time.perf_counter()
        self._open: list[tuple[str, float]] = []  # phases that are open, with the seconds that others inside took

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds inside to a phase; those of a phase inside it count for that one only."""
        self._open.append((name, 0.0))
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._add(name, seconds - self._open.pop()[1])
            self._inside(seconds)

    @contextlib.contextmanager
    def compilations(self) -> Iterator[None]:
        """Inside, what XLA compiles in the course of a phase counts for `compile`, not for that phase."""
        thread = threading.get_ident()

        def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            if event == _COMPILED and threading.get_ident() == thread and self.current not in ('', 'compile'):
                self._add('compile', duration_secs)
                self._inside(duration_secs)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    @property
    def current(self) -> str:
        """The innermost phase that is open; '' outside of all. May be asked from another thread."""
        opened = self._open[-1:]
        return opened[0][0] if opened else ''

    def within(self, names: Collection[str]) -> bool:
        """Whether one of these phases is open. May be asked from another thread."""
        return any(name in names for name, _ in list(self._open))

    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self.started

    def _add(self, name: str, seconds: float) -> None:
        self.phases[name] = self.phases.get(name, 0.0) + seconds

    def _inside(self, seconds: float) -> None:
        """Takes seconds from the innermost open phase."""
        if self._open:
            name, taken = self._open[-1]
            self._open[-1] = (name, taken + seconds)
