"""Where a run's time goes."""

import contextlib
import time
from collections.abc import Iterator


class PhaseTimer:
    """Seconds by phase.

    Attributes:
      phases: seconds of each.
      started: when it was made, by `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.started = time.perf_counter()
        self._open: list[float] = []  # seconds spent in phases inside each open one

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds inside to a phase; those of a phase inside it count for that one only."""
        self._open.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.phases[name] = self.phases.get(name, 0.0) + seconds - self._open.pop()
            if self._open:
                self._open[-1] += seconds

    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self.started
