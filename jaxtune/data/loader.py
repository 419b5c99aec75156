"""The loader: batch t is a pure function of the seed and t.

So a run resumes from one integer, and any number of processes, each reading the rows of its own devices, sees the same
global batches.
"""

import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtune.data.mixture import Mixture, passes
from jaxtune.errors import UserError

Batch = dict[str, np.ndarray]
ReadRows = Callable[[int, int], Batch]


class Loader:
    """Cuts rows into batches.

    Shuffled, the passes over the rows follow each other without a gap, each in an order of its own; of a mixture, those
    over each source. In order, the last
    batch of a pass is filled up with rows of zeros (weight 0, segment 0), so that each row is seen exactly once.

    Args:
      rows: numbered rows `{field: array}` of equal shapes: a `grain.MapDataset`, or whatever can be its source; or, to
        be shuffled, a `Mixture` of them.
      batch_size: rows of a global batch.
      seed: of the order.
      shuffle: in an order drawn anew for every pass, or in the rows' own.

    Raises:
      UserError: there are no rows.
    """

    def __init__(self, rows: Any, batch_size: int, seed: int = 0, shuffle: bool = True) -> None:
        if not len(rows):
            raise UserError('data.train, data.eval: the data gives no rows; expected at least one')
        self.batch_size, self.shuffle, self.size = batch_size, shuffle, len(rows)
        dataset: Any = rows
        if shuffle:
            dataset = rows.shuffled(seed) if isinstance(rows, Mixture) else passes(rows, seed)
        self._dataset = dataset
        first: Any = dataset[0]
        self._padding = {name: np.zeros_like(value) for name, value in first.items()}

    def __len__(self) -> int:
        """Batches a pass, the last one included."""
        return -(-self.size // self.batch_size)

    def rows(self, t: int, low: int, high: int) -> Batch:
        """Rows low..high of global batch t, `{field: [high - low, ...]}`."""
        if self.shuffle:
            first = t * self.batch_size
            rows = [self._dataset[first + i] for i in range(low, high)]
        else:
            first = t % len(self) * self.batch_size
            rows = [self._dataset[first + i] if first + i < self.size else self._padding for i in range(low, high)]
        return {name: np.stack([row[name] for row in rows]) for name in self._padding}

    def prefetch(self, start: int, stop: int, place: Callable[[ReadRows], Any], depth: int = 2) -> 'Prefetch':
        """Batches start..stop, each read and placed ahead by a thread.

        Args:
          start: first batch.
          stop: one after the last.
          place: makes a batch of `rows(low, high)`, the reader of one global batch.
          depth: how many are kept ready.
        """

        def read(t: int) -> Any:
            return place(lambda low, high: self.rows(t, low, high))

        return Prefetch(read, start, stop, depth)


class Prefetch:
    """`read(start), read(start + 1), … read(stop - 1)`, done ahead by a thread; an exception there is raised here.

    The thread starts at once and ends with `close()`, at the end of a `with` block, or when this is forgotten.
    """

    def __init__(self, read: Callable[[int], Any], start: int, stop: int, depth: int = 2) -> None:
        self._ready: queue.Queue = queue.Queue(depth)
        self._closed = threading.Event()
        self._left = stop - start
        # The thread holds no reference to this object, so that forgetting it ends the thread.
        arguments = (read, range(start, stop), self._ready, self._closed)
        self._thread = threading.Thread(target=_read_ahead, args=arguments, name='jaxtune-prefetch', daemon=True)
        self._thread.start()

    def __iter__(self) -> 'Prefetch':
        return self

    def __next__(self) -> Any:
        if self._left <= 0 or self._closed.is_set():
            raise StopIteration
        value, error = self._ready.get()
        if error is not None:
            self.close()
            raise error
        self._left -= 1
        return value

    def __enter__(self) -> 'Prefetch':
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._closed.set()

    def close(self) -> None:
        """Ends the thread and waits for it."""
        self._closed.set()
        self._thread.join()


def _read_ahead(read: Callable[[int], Any], numbers: range, ready: queue.Queue, closed: threading.Event) -> None:
    for t in numbers:
        if closed.is_set():
            return
        try:
            item = (read(t), None)
        except BaseException as error:  # the consumer raises it
            item = (None, error)
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if item[1] is not None:
            return
