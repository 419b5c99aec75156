"""Answers in rows: several with their prompts share one, each a segment that sees itself alone, or its prompt too."""

import numpy as np

from jaxtune.models.prompts import SHARED
from jaxtune.rl.layout import scored_places, separate_rows, shared_rows, spans
from jaxtune.rl.rollouts import Rollouts


class RolloutPacker:
    """Where some answers lie in rows, and numbers of their tokens there and back.

    A number of a token stands at the place before it, where it is predicted. Numbers of an answer's tokens are those of
    the tokens that the policy wrote, one after the other: what an environment wrote between them is read alone.

    Attributes:
      shape: rows and their length, of which there are few, so that few shapes are compiled.
      used: how many rows are not empty.

    Args:
      rollouts: the answers.
      chosen: the numbers of those to pack.
      length: of a row at most, but where prompts are shared.
      packing: several share a row; else each has its own.
      unit: the number of rows is this times 1, 2, 3, 4, 6, 8, 12 …; or what all answers alone would need, where that
        is less.
      parts: devices that divide a row's length.
      share: answers to one prompt may share its tokens, which needs fewer places the longer it is.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        chosen: np.ndarray,
        length: int,
        packing: bool,
        unit: int = 1,
        parts: int = 1,
        share: bool = False,
    ) -> None:
        start, self.end = rollouts.start[chosen], rollouts.end[chosen]
        self.tokens, self.parts = rollouts.tokens[chosen], parts
        self.width = rollouts.logprobs.shape[1]
        self.layout = separate_rows(self.end, length, packing, unit, parts)
        if packing and share:
            prompts = [row[:start].tobytes() for row, start in zip(self.tokens, start, strict=True)]
            shared = shared_rows(prompts, start, self.end, unit, parts)
            if shared.places < 0.9 * self.layout.places:  # they attend to more
                self.layout = shared
        self.shape, self.row, self.at = self.layout.shape, self.layout.row, self.layout.at
        self.used = int(self.row.max()) + 1
        of, place = np.nonzero(rollouts.own[chosen])
        self.lengths = np.bincount(of, minlength=len(chosen))
        self._answers = spans(self.lengths)  # (answer, token) of every token of the answers
        self._places = (self.row[of], self.at[of] + place - 1)

    def fields(self) -> dict[str, np.ndarray]:
        """The rows, `{field: [rows, length]}`.

        `tokens`, `positions` and `segment_ids` for `Model.apply`; `loss_mask`, 1 where a token of an answer is
        predicted; `shares`, the same over the length of the answer; `places`, as `scored_places` says.
        """
        fields = {name: np.zeros(self.shape, np.int32) for name in ('tokens', 'positions', 'segment_ids')}

        def put(row: np.ndarray, place: np.ndarray, of: np.ndarray, token: np.ndarray, segment: np.ndarray) -> None:
            fields['tokens'][row, place], fields['positions'][row, place] = self.tokens[of, token], token
            fields['segment_ids'][row, place] = segment

        first = self.layout.first
        of, token = spans(self.end - first)
        token = token + first[of]
        put(self.row[of], self.at[of] + token, of, token, self.layout.segment[of])
        rows, answers = self.layout.shared
        number, token = spans(first[answers])
        put(rows[number], token, answers[number], token, np.full(len(token), SHARED))
        of, _ = self._answers
        fields |= {name: np.zeros(self.shape, np.float32) for name in ('loss_mask', 'shares')}
        fields['loss_mask'][self._places] = 1.0
        fields['shares'][self._places] = (1.0 / self.lengths)[of]
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
