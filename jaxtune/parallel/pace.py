"""Which host of a pod holds up the others.

All devices of a pod end an update together, however late one host hands over its part; so what tells hosts apart is
the time that each spends outside of it: waiting for its own data, and in Python. Every process sends its own to process
0 over the connections of `liveness`, which adds nothing to a step.
"""

import statistics
import threading
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.common.formatting import short_time

_SHARE = 0.1  # of an update, from which on a host is told of
_ROW = 3  # reports in a row of the same slow host before anybody is told
_KEPT = 4  # reports that wait for those of other hosts


def slow_host(seconds: Mapping[int, float], update: float) -> int | None:
    """The process that is so much slower than the median one that it costs a tenth of an update; None if none is.

    Args:
      seconds: what each process takes outside of an update's computation, an update.
      update: seconds of one from beginning to end.
    """
    slowest = max(seconds, key=lambda process: seconds[process])
    extra = seconds[slowest] - statistics.median_low(seconds.values())
    return slowest if extra > _SHARE * update else None


class Pace:
    """Compares the hosts of a pod.

    Args:
      processes: how many there are.
      process: the number of this one.
      host: the name of its host.
      send: takes what goes to process 0.
      say: takes the line about a slow host, in process 0.
    """

    def __init__(
        self, processes: int, process: int, host: str, send: Callable[[Any], None], say: Callable[[str], None]
    ) -> None:
        self.processes, self.process, self.host, self.send, self.say = processes, process, host, send, say
        self._reports: dict[int, dict[int, tuple[str, float]]] = {}
        self._updates: dict[int, float] = {}
        self._lock = threading.Lock()
        self._slowest: int | None = None
        self._row = 0  # reports in which it was

    def report(self, step: int, own: float, update: float) -> None:
        """Says what this process took for the steps up to this one.

        Args:
          step: the newest one.
          own: seconds a step outside of its computation.
          update: seconds a step in all.
        """
        if self.process:
            self.send({'pace': [step, own]})
            return
        with self._lock:
            self._updates[step] = update
        self._add(step, 0, self.host, own)

    def receive(self, process: int, host: str, message: Any) -> None:
        """In process 0: takes what another one has sent."""
        if isinstance(message, dict) and 'pace' in message:
            step, own = message['pace']
            self._add(int(step), process, host, float(own))

    def _add(self, step: int, process: int, host: str, own: float) -> None:
        with self._lock:
            self._reports.setdefault(step, {})[process] = (host, own)
            if len(self._reports[step]) < self.processes:
                for old in sorted(self._reports)[:-_KEPT]:
                    del self._reports[old]
                    self._updates.pop(old, None)
                return
            found, update = self._reports.pop(step), self._updates.pop(step)
            seconds = {number: value for number, (_, value) in found.items()}
            slowest = slow_host(seconds, update)
            self._row = self._row + 1 if slowest == self._slowest else 1
            self._slowest, row = slowest, self._row
        if slowest is not None and row == _ROW:
            extra = seconds[slowest] - statistics.median_low(seconds.values())
            self.say(
                f'host {found[slowest][0]} (process {slowest}) is slower than the median host by {short_time(extra)} '
                f'an update of {short_time(update)}: it takes {short_time(seconds[slowest])} to read data and in Python'
            )
