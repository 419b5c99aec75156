"""Rows: documents cut and packed to `seq_len` tokens, each row with targets, loss mask, positions and segments.

A row is `{field: [seq_len]}`: `tokens` int32; `targets` int32, the token that position j predicts; `loss_mask` float32,
1 where it is scored; `positions` int32, from 0 in each segment; `segment_ids` int32, 1.. for the parts of documents
that do not see each other, 0 = padding.
"""

import abc
import bisect

import numpy as np

from jaxtune.data.tokens import Tokens

Row = dict[str, np.ndarray]


class Rows(abc.ABC):
    """Rows by number, for `grain.MapDataset.source`.

    Attributes:
      tokens: where they are cut from.
      seq_len: length of a row.
      unscored_tokens: tokens that no position predicts: the first of every document or window.
    """

    tokens: Tokens
    seq_len: int
    unscored_tokens: int

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def _row(self, index: int) -> Row: ...

    def __getitem__(self, index: int) -> Row:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f'row {index} of {len(self)}')
        return self._row(index)

    def _fill(self, row: Row, at: int, low: int, high: int, end: int, segment: int) -> None:
        """Writes tokens low..high of the stream at `at`; their targets lie before `end`."""
        size, scored = high - low, min(high, end - 1) - low
        row['tokens'][at : at + size] = self.tokens.tokens[low:high]
        row['targets'][at : at + scored] = self.tokens.tokens[low + 1 : low + 1 + scored]
        row['loss_mask'][at : at + scored] = 1.0
        row['positions'][at : at + size] = np.arange(size)
        row['segment_ids'][at : at + size] = segment

    def _empty(self) -> Row:
        row = {name: np.zeros(self.seq_len, np.int32) for name in ('tokens', 'targets', 'positions', 'segment_ids')}
        return row | {'loss_mask': np.zeros(self.seq_len, np.float32)}


class ConcatRows(Rows):
    """See `concat_rows`."""

    def __init__(self, tokens: Tokens, seq_len: int) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        self.unscored_tokens = int(np.count_nonzero(np.diff(tokens.offsets)))

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.seq_len)

    def _row(self, index: int) -> Row:
        low = index * self.seq_len
        high = min(low + self.seq_len, len(self.tokens))
        offsets = self.tokens.offsets
        document = int(np.searchsorted(offsets, low, 'right')) - 1
        row, segment, at = self._empty(), 0, low
        while at < high:
            end = int(offsets[document + 1])
            stop = min(end, high)
            if stop > at:  # an empty document has no segment
                segment += 1
                self._fill(row, at - low, at, stop, end, segment)
            at, document = stop, document + 1
        return row


class WindowRows(Rows):
    """See `window_rows`."""

    def __init__(self, tokens: Tokens, seq_len: int, packing: bool) -> None:
        self.tokens, self.seq_len = tokens, seq_len
        self.starts, self.sizes = cut_documents(tokens, seq_len)
        self.unscored_tokens = len(self.starts)
        self.bins = Bins(self.sizes, seq_len, packing)

    def __len__(self) -> int:
        return len(self.bins)

    def _row(self, index: int) -> Row:
        row, at = self._empty(), 0
        for segment, window in enumerate(self.bins[index], 1):
            low = int(self.starts[window])
            high = low + int(self.sizes[window])
            self._fill(row, at, low, high, high, segment)
            at += high - low
        return row


def concat_rows(tokens: Tokens, seq_len: int) -> ConcatRows:
    """For training: the stream of all documents, cut every `seq_len` tokens; the last row is filled up.

    Every token but a document's first is the target of exactly one position, also where the two lie in different rows;
    the part of a document in the next row is a segment of its own, from position 0 on.
    """
    return ConcatRows(tokens, seq_len)


def window_rows(tokens: Tokens, seq_len: int, packing: bool = True) -> WindowRows:
    """For evaluation: each document cut into windows of `seq_len` tokens that never see each other.

    A window's first token is not scored, so a document's loss does not depend on its neighbours.

    Args:
      tokens: the documents.
      seq_len: length of a window, and of a row.
      packing: several windows share a row; else each has its own.
    """
    return WindowRows(tokens, seq_len, packing)


def cut_documents(tokens: Tokens, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Each document in pieces of `size` tokens, the last one shorter: where they start in the stream, their sizes."""
    counts = -(-np.diff(tokens.offsets) // size)
    inner = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # its number in its document
    starts = np.repeat(tokens.offsets[:-1], counts) + inner * size
    return starts, np.minimum(np.repeat(tokens.offsets[1:], counts) - starts, size)


class Bins:
    """Which items share a row, by the row's number; each has its own without packing."""

    def __init__(self, sizes: np.ndarray, capacity: int, packing: bool) -> None:
        bins = pack(sizes, capacity) if packing else np.arange(len(sizes))
        self.order = np.argsort(bins, kind='stable')
        self.edges = np.concatenate([[0], np.cumsum(np.bincount(bins))]) if len(sizes) else np.zeros(1, np.int64)

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.order[self.edges[index] : self.edges[index + 1]]


def pack(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: which bin each item goes to (Johnson 1974; within 11/9 of the optimum).

    Items of one size are placed together: the tightest bins that take one are filled with as many as fit, which is what
    placing them one by one does. Bins are numbered by the first item in them, so that rows keep the documents' order.

    Args:
      sizes: `[items]`, each from 1 to `capacity`.
      capacity: of every bin.

    Returns:
      `[items]` numbers of bins, 0 up to their count.
    """
    order = np.argsort(-sizes, kind='stable')
    values, counts = np.unique(-sizes, return_counts=True)
    bins = np.zeros(len(sizes), np.int64)
    free: dict[int, np.ndarray] = {}  # room left -> bins with that room
    rooms: list[int] = []  # its keys in order
    opened = at = 0
    for size, count in zip((-values).tolist(), counts.tolist(), strict=True):
        stop = at + count
        while at < stop:
            tightest = bisect.bisect_left(rooms, size)
            room = rooms.pop(tightest) if tightest < len(rooms) else capacity
            fits = room // size
            needed = -(-(stop - at) // fits)
            if room in free:
                candidates = free.pop(room)
            else:
                candidates = np.arange(opened, opened + needed)
                opened += needed
            used, left = candidates[:needed], candidates[needed:]
            placed = np.repeat(used, fits)[: stop - at]
            bins[order[at : at + len(placed)]] = placed
            at += len(placed)
            last = len(placed) - (len(used) - 1) * fits  # the last bin may have got fewer
            for open_bins, rest in ((left, room), (used[:-1], room % size), (used[-1:], room - last * size)):
                if len(open_bins) and rest in free:
                    free[rest] = np.concatenate([free[rest], open_bins])
                elif len(open_bins) and rest:
                    free[rest] = open_bins
                    bisect.insort(rooms, rest)
    _, first, inverse = np.unique(bins, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first, kind='stable'), kind='stable')[inverse]
