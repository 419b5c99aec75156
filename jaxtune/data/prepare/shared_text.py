"""Text that documents share, cut from all but the first of them: what paragraphs and substrings have in common."""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from jaxtune.data.prepare import Dropped
from jaxtune.data.prepare.plan import Plan
from jaxtune.data.prepare.remaining import Candidate

WHOLE = ('code', 'records')  # kinds of documents that nothing is cut from


class Known:
    """Hashes that several documents hold, and in which each stays.

    Args:
      hash: sorted uint64 `[hashes]`.
      first: numbers of documents, int64 `[hashes]`.
    """

    def __init__(self, hash: np.ndarray, first: np.ndarray) -> None:
        self.hash, self.first = hash, first

    def elsewhere(self, hashes: np.ndarray, number: int) -> np.ndarray:
        """Which hashes of document `number` stay in another, bool `[len(hashes)]`."""
        if not len(self.hash):
            return np.zeros(len(hashes), bool)
        at = np.minimum(np.searchsorted(self.hash, hashes), len(self.hash) - 1)
        return (self.hash[at] == hashes) & (self.first[at] != number)


class Cutter(Protocol):
    """Cuts what other documents hold."""

    def cut(self, text: str, number: int) -> str:
        """The text of document `number` without it."""
        ...


def judge(cutter: Cutter, reason: str, plan: Plan) -> Callable[[Candidate], str | None]:
    """The function that cuts documents, and drops those of which too little is left, for this reason."""
    least = max(1, plan.keys['min_chars'])

    def cut(candidate: Candidate) -> str | None:
        if candidate.document.kind in WHOLE:
            return None
        text = cutter.cut(candidate.text, candidate.number)
        return Dropped(reason, candidate.document.text) if len(text.strip()) < least else text

    return cut


def starts(values: np.ndarray) -> np.ndarray:
    """Where a value differs from the one before, bool `[n]`."""
    return np.concatenate([[True], values[1:] != values[:-1]]) if len(values) else np.zeros(0, bool)
