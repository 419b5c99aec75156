"""Answers in rows: several with their prompts share one, each a segment that sees itself alone."""

import numpy as np

from jaxtune.data.packing import pack
from jaxtune.rl.rollouts import Rollouts


class RolloutPacker:
    """Where some answers lie in rows, and numbers of their tokens there and back.

    A number of a token stands at the place before it, where it is predicted. Numbers of an answer's tokens are those of
    the tokens that the policy wrote, one after the other: what an environment wrote between them is read alone.

    Attributes:
      shape: rows and their length.
      used: how many rows are not empty.

    Args:
      rollouts: the answers.
      chosen: the numbers of those to pack.
      length: of a row.
      packing: several share a row; else each has its own.
      unit: the number of rows is this times 1, 2, 3, 4, 6, 8, 12 …, so that few shapes are compiled; or what all
        answers alone would need, where that is less.
    """

    def __init__(self, rollouts: Rollouts, chosen: np.ndarray, length: int, packing: bool, unit: int = 1) -> None:
        self.end = rollouts.end[chosen]
        self.tokens = rollouts.tokens[chosen]
        self.width = rollouts.logprobs.shape[1]
        row = pack(self.end, length) if packing else np.arange(len(chosen))
        self.used = int(row.max()) + 1
        needed = -(-self.used // unit)
        power = 1 << (needed - 1).bit_length()
        rows = unit * min(power * 3 // 4 if needed <= power * 3 // 4 else power, -(-len(chosen) // unit))
        self.shape = (rows, length)
        order = np.argsort(row, kind='stable')
        before = np.concatenate([[0], np.cumsum(self.end[order])[:-1]])
        first = np.searchsorted(row[order], row[order])  # where each one's row begins in the order
        at, segment = np.empty_like(before), np.empty_like(before)
        at[order], segment[order] = before - before[first], np.arange(len(order)) - first + 1
        self.row, self.at, self.segment = row, at, segment
        of, place = np.nonzero(rollouts.own[chosen])
        self.lengths = np.bincount(of, minlength=len(chosen))
        self._answers = _spans(self.lengths)  # (answer, token) of every token of the answers
        self._places = (row[of], at[of] + place - 1)

    def fields(self) -> dict[str, np.ndarray]:
        """The rows, `{field: [rows, length]}`.

        `tokens`, `positions` and `segment_ids` for `Model.apply`; `loss_mask`, 1 where a token of an answer is
        predicted; `shares`, the same over the length of the answer.
        """
        of, token = _spans(self.end)
        places = (self.row[of], self.at[of] + token)
        fields = {name: np.zeros(self.shape, np.int32) for name in ('tokens', 'positions', 'segment_ids')}
        fields['tokens'][places], fields['positions'][places] = self.tokens[of, token], token
        fields['segment_ids'][places] = self.segment[of]
        of, _ = self._answers
        fields |= {name: np.zeros(self.shape, np.float32) for name in ('loss_mask', 'shares')}
        fields['loss_mask'][self._places] = 1.0
        fields['shares'][self._places] = (1.0 / self.lengths)[of]
        return fields

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


def _spans(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(which, place)` of everything in spans of these sizes, one after the other."""
    of = np.repeat(np.arange(len(sizes)), sizes)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
