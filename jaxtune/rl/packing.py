"""Answers in rows: several with their prompts share one, each a segment that sees itself alone."""

import math

import numpy as np

from jaxtune.data.packing import pack
from jaxtune.rl.rollouts import Rollouts

_TILE = 128  # lengths of rows are multiples, as the tiles of attention are


class RolloutPacker:
    """Where some answers lie in rows, and numbers of their tokens there and back.

    A number of a token stands at the place before it, where it is predicted.

    Attributes:
      shape: rows and their length, one of `row_lengths`: that with the fewest places in all, or nearly.
      used: how many rows are not empty.

    Args:
      rollouts: the answers.
      chosen: the numbers of those to pack.
      length: of a row at most.
      packing: several share a row; else each has its own.
      unit: the number of rows is this times 1, 2, 3, 4, 6, 8, 12 …, so that few shapes are compiled; or what all
        answers alone would need, where that is less.
      parts: devices that divide a row's length.
    """

    def __init__(
        self, rollouts: Rollouts, chosen: np.ndarray, length: int, packing: bool, unit: int = 1, parts: int = 1
    ) -> None:
        self.start, self.end = rollouts.start[chosen], rollouts.end[chosen]
        self.tokens, self.parts = rollouts.tokens[chosen], parts
        self.width = rollouts.logprobs.shape[1]
        self.shape, row = self._rows(length, packing, unit)
        self.used = int(row.max()) + 1
        order = np.argsort(row, kind='stable')
        before = np.concatenate([[0], np.cumsum(self.end[order])[:-1]])
        first = np.searchsorted(row[order], row[order])  # where each one's row begins in the order
        at, segment = np.empty_like(before), np.empty_like(before)
        at[order], segment[order] = before - before[first], np.arange(len(order)) - first + 1
        self.row, self.at, self.segment = row, at, segment
        self._answers = _spans(self.end - self.start)  # (answer, token) of every token of the answers
        of, token = self._answers
        self._places = (row[of], at[of] + self.start[of] - 1 + token)

    def _rows(self, length: int, packing: bool, unit: int) -> tuple[tuple[int, int], np.ndarray]:
        """The shape, and which row each answer goes to; longer rows, which attend to more, must save a tenth."""
        least, found = 0, None
        for size in row_lengths(length, self.parts):
            if size < self.end.max():
                continue
            row = pack(self.end, size) if packing else np.arange(len(self.end))
            rows = unit * min(few(-(-(int(row.max()) + 1) // unit)), -(-len(self.end) // unit))
            if found is None or rows * size < 0.9 * least:
                least, found = rows * size, ((rows, size), row)
        assert found is not None  # no answer is longer than `length`
        return found

    def fields(self) -> dict[str, np.ndarray]:
        """The rows, `{field: [rows, length]}`.

        `tokens`, `positions` and `segment_ids` for `Model.apply`; `loss_mask`, 1 where a token of an answer is
        predicted; `shares`, the same over the length of the answer; `places`, as `scored_places` says.
        """
        of, token = _spans(self.end)
        places = (self.row[of], self.at[of] + token)
        fields = {name: np.zeros(self.shape, np.int32) for name in ('tokens', 'positions', 'segment_ids')}
        fields['tokens'][places], fields['positions'][places] = self.tokens[of, token], token
        fields['segment_ids'][places] = self.segment[of]
        of, _ = self._answers
        fields |= {name: np.zeros(self.shape, np.float32) for name in ('loss_mask', 'shares')}
        fields['loss_mask'][self._places] = 1.0
        fields['shares'][self._places] = (1.0 / (self.end - self.start))[of]
        return fields | {'places': scored_places(fields['loss_mask'], self.parts)}

    def spread(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers of each token of the answers, `[answers, width]`, as `[rows, length]`."""
        rows = np.zeros(self.shape, np.float32)
        rows[self._places] = numbers[self._answers]
        return rows

    def gather(self, numbers: np.ndarray) -> np.ndarray:
        """The other way round; 0 after an answer's end."""
        gathered = np.zeros((len(self.end), self.width), np.float32)
        gathered[self._answers] = numbers[self._places]
        return gathered


def few(count: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16 … that is not less."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power


def row_lengths(longest: int, parts: int = 1) -> list[int]:
    """The lengths that rows may have: at most nine, so that few shapes are compiled, the shortest first.

    Args:
      longest: which is one of them.
      parts: devices that divide a row.
    """
    unit = math.lcm(_TILE, parts) * max(1, longest // (16 * math.lcm(_TILE, parts)))
    return [*[unit * times for times in (1, 2, 3, 4, 6, 8, 12) if unit * times < longest], longest]


def scored_count(length: int, most: int, parts: int = 1) -> int:
    """For how many places of a row of `length` there is room, where none has more than `most` that are scored.

    Sixteenths of the row times 1, 2, 3, 4, 6, 8, 12 or 16, so that few shapes are compiled; a multiple of `parts`.
    """
    unit = -(-length // (16 * parts)) * parts
    return min(length, unit * few(max(1, -(-most // unit))))


def scored_places(mask: np.ndarray, parts: int = 1) -> np.ndarray:
    """Where each row's scored tokens are predicted, `[rows, scored_count]` int32, rising; `length` fills up.

    Args:
      mask: `[rows, length]`, 0 where nothing is scored.
      parts: devices that divide a row.
    """
    counts, length = np.count_nonzero(mask, axis=1), mask.shape[1]
    places = np.full((len(mask), scored_count(length, int(counts.max()), parts)), length, np.int32)
    of, at = np.nonzero(mask)
    places[of, _spans(counts)[1]] = at
    return places


def _spans(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(which, place)` of everything in spans of these sizes, one after the other."""
    of = np.repeat(np.arange(len(sizes)), sizes)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
