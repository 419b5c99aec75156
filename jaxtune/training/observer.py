"""What looks at the loop from beside it: a trace of some updates, hangs, slow hosts, and what the time went into."""

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator

from jaxtune.parallel.pace import Pace
from jaxtune.training.hang_watch import HangWatch
from jaxtune.training.profile import Profile
from jaxtune.training.run_info import RunInfo

_KEEP_SECONDS = 30.0  # between two versions of run.json, which a killed run leaves


class Observer:
    """Sees every step of the loop begin and end; used as a context around it.

    Args:
      info: of the run, which is written down as it goes.
      workdir: of the run.
      every: steps between two comparisons of hosts (`log.every`).
      profile: traces some steps, or None.
      hangs: watches for a step that does not end, or None.
      pace: compares hosts, or None where there is one.
    """

    def __init__(
        self,
        info: RunInfo,
        workdir: pathlib.Path,
        every: int,
        profile: Profile | None = None,
        hangs: HangWatch | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.info, self.workdir, self.every = info, workdir, every
        self.profile, self.hangs, self.pace = profile, hangs, pace
        self._step, self._kept = 0, time.monotonic()
        self._context = contextlib.ExitStack()

    def __enter__(self) -> 'Observer':
        self._context.enter_context(self.info.timer.compilations())
        if self.hangs:
            self._context.enter_context(self.hangs)
        if self.profile:
            self._context.callback(lambda: self.profile and self.profile.stop(self._step))
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    def steps(self, steps: Iterable[int], flush: Callable[[], None]) -> Iterator[int]:
        """The steps one after the other, seen before and after.

        Args:
          steps: their numbers.
          flush: waits for those that have begun.
        """
        since, before, compared = time.perf_counter(), self._busy(), None
        for step in steps:
            self._step = step
            compared = step - 1 if compared is None else compared
            if self.hangs:
                self.hangs.begin(step)
            if self.profile:
                self.profile.before(step, flush)
            yield step
            if self.profile:
                self.profile.after(step, flush)
            if step % self.every:
                continue
            if self.pace:
                now, busy = time.perf_counter(), self._busy()
                own = now - since - (busy - before)
                self.pace.report(step, own / (step - compared), (now - since) / (step - compared))
                since, before, compared = now, busy, step
            if time.monotonic() - self._kept > _KEEP_SECONDS:
                self.info.write(self.workdir)
                self._kept = time.monotonic()

    def _busy(self) -> float:
        """Seconds in phases in which a host waits for the devices, and so for the other hosts."""
        return sum(seconds for name, seconds in self.info.timer.phases.items() if name != 'data')
