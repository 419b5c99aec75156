"""Which answers a step learns from, and what it takes off those that are too long; on the host."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a recipe's `rl` says of equal groups and of long answers (DAPO, Yu et al. 2025, arXiv:2503.14476).

    Attributes:
      group: answers to each prompt, which follow each other.
      skip_equal: groups whose scores are all equal are not learnt from.
      overlong: `mask`: answers that were cut are not learnt from; `soft`: long ones cost more and more; or ''.
      longest: tokens of an answer at most, where it is cut.
      buffer: of these the last, over which the penalty grows to 1; 0 = a fifth of them.
      missing_eos_penalty: taken off the reward of an answer that was cut.
    """

    group: int = 1
    skip_equal: bool = False
    overlong: str = ''
    longest: int = 0
    buffer: int = 0
    missing_eos_penalty: float = 0.0

    def penalties(self, lengths: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """What is taken off the rewards `[answers]` float32, of answers of so many tokens."""
        taken = np.float32(self.missing_eos_penalty) * ~ended
        if self.overlong == 'soft':
            buffer = self.buffer or max(1, self.longest // 5)
            taken = taken + soft_overlong(lengths, self.longest, buffer)
        return taken.astype(np.float32)

    def equal(self, scores: np.ndarray) -> np.ndarray:
        """Whether all scores of an answer's group are the same, `[answers]` bool; False without groups."""
        if self.group == 1:
            return np.zeros(len(scores), bool)
        groups = scores.reshape(-1, self.group)
        return (groups.max(-1) == groups.min(-1)).repeat(self.group)

    def learnt(self, scores: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """The answers that are learnt from, `[answers]` bool."""
        learnt = ended.copy() if self.overlong == 'mask' else np.ones(len(scores), bool)
        return learnt & ~self.equal(scores) if self.skip_equal else learnt


def soft_overlong(lengths: np.ndarray, longest: int, buffer: int) -> np.ndarray:
    """DAPO's penalty (equation 13) `[answers]` float32: from 0 at `longest - buffer` tokens to 1 at `longest`."""
    return np.clip((lengths - (longest - buffer)) / buffer, 0.0, 1.0).astype(np.float32)
