"""Notices an update that does not end, and writes down where every thread of the process stands."""

import collections
import contextlib
import faulthandler
import os
import pathlib
import socket
import threading
import time

from jaxtune.common import stderr
from jaxtune.common.formatting import duration
from jaxtune.training.phases import PhaseTimer

FOLDER = 'hangs'

# An update hangs when it takes longer than `log.hang_seconds`, and so many times as long as the longest of the last.
_TIMES, _LAST = 10.0, 20
_GRACE_SECONDS = 0.5  # in which a thread gets to run on a busy machine
# What may take long between two updates, and says so itself.
_OTHER_WORK = ('eval', 'checkpoint', 'compile', 'samples', 'export', 'load')
_DOING = {'data': 'it waits for data', 'step': 'it waits for the devices', 'reward': 'it waits for rewards'}


class HangWatch:
    """A thread beside the loop; it reports, and ends nothing.

    Where a library keeps Python's lock, so that this thread stands still too, the interpreter's own watchdog writes the
    stacks to standard error; that knows no update.

    Args:
      seconds: how long an update may take before anybody is told.
      timer: knows what the loop is doing.
      workdir: gets `hangs/process-N.txt`.
      process: the number of this one.
      unit: what a step is called.
    """

    def __init__(self, seconds: float, timer: PhaseTimer, workdir: pathlib.Path, process: int, unit: str) -> None:
        self.seconds, self.timer, self.process, self.unit = seconds, timer, process, unit
        self.path = workdir / FOLDER / f'process-{process}.txt'
        self._took: collections.deque[float] = collections.deque(maxlen=_LAST)
        self._lock = threading.Lock()
        self._step, self._since, self._told = 0, time.monotonic(), False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name='hang-watch', daemon=True)

    def __enter__(self) -> 'HangWatch':
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def begin(self, step: int) -> None:
        """A step begins, so that the one before it does not hang."""
        with self._lock:
            now, before, told = time.monotonic(), self._step, self._told
            took = now - self._since
            if before:
                self._took.append(took)
            self._step, self._since, self._told = step, now, False
        if told:
            _say(f'{self._name(before)} has ended after {duration(took)}; the run goes on')

    def _limit(self) -> float:
        return max(self.seconds, _TIMES * max(self._took, default=0.0))

    def _watch(self) -> None:
        while not self._over.wait(min(max(self._limit() / 10, 0.01), 5.0)):
            self._look()
            faulthandler.dump_traceback_later(self._limit() + _GRACE_SECONDS, file=stderr.descriptor())  # begins anew
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        """Tells of a step that hangs, once."""
        with self._lock:
            if self.timer.within(_OTHER_WORK):
                self._since = time.monotonic()
                return
            waited = time.monotonic() - self._since
            if not self._step or self._told or waited <= self._limit():
                return
            self._told, step = True, self._step
        doing = _DOING.get(self.timer.current, f'it is in {self.timer.current or "Python"}')
        line = f'{self._name(step)} has not ended for {duration(waited)}, {doing}; stacks of its threads: {self.path}'
        _say(line)
        faulthandler.dump_traceback(stderr.descriptor(), all_threads=True)
        with contextlib.suppress(OSError):  # a disk that hangs too, or is full
            self.path.parent.mkdir(exist_ok=True)
            with self.path.open('a', encoding='utf-8') as file:
                file.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")} {line}\n')
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)

    def _name(self, step: int) -> str:
        return f'process {self.process} on {socket.gethostname()}: {self.unit} {step}'


def _say(text: str) -> None:
    """A line past the locks of the streams, which a thread that hangs may hold."""
    with contextlib.suppress(OSError):
        os.write(stderr.descriptor(), f'jaxtune: {text}\n'.encode())
