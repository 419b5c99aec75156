"""Groups without a signal replaced by answers to other prompts (DAPO, Yu et al. 2025, arXiv:2503.14476, 3.2)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxtune.rl.rollouts import Rollouts
from jaxtune.rl.selection import Selection

# `(round, groups) -> (answers, scores)`: of as many other prompts, the same for the same round of the same step.
Draw = Callable[[int, int], tuple[Rollouts, np.ndarray]]


def resample(
    answers: Rollouts, scores: np.ndarray, selection: Selection, rounds: int, draw: Draw
) -> tuple[Rollouts, np.ndarray, int]:
    """Answers of which, if that many rounds find them, every group has a signal.

    In each round as many prompts are asked as there are groups without one; those of the new groups that have one take
    the places of the first that have not.

    Args:
      answers: of a step, those of a group together.
      scores: theirs.
      selection: which knows the groups, and which of them are equal.
      rounds: at most.
      draw: asks other prompts.

    Returns:
      `(answers, scores, asked)`, with how many prompts were asked.
    """
    asked = 0
    for number in range(rounds):
        lacking = np.flatnonzero(selection.equal(scores)).reshape(-1, selection.group)
        if not len(lacking):
            break
        others, their_scores = draw(number, len(lacking))
        asked += len(lacking)
        better = np.flatnonzero(~selection.equal(their_scores))
        places = lacking[: len(better) // selection.group].ravel()
        answers = replaced(answers, places, others, better)
        scores = scores.copy()
        scores[places] = their_scores[better]
    return answers, scores, asked


def replaced(answers: Rollouts, places: np.ndarray, others: Rollouts, chosen: np.ndarray) -> Rollouts:
    """Answers with those of `others` that are chosen in some of their places."""

    def put(own: Any, new: Any) -> Any:
        if own is None or not len(own):  # there was no environment
            return own
        if isinstance(own, np.ndarray):
            changed = own.copy()
            changed[places] = new[chosen]
            return changed
        kept = list(own)
        for place, number in zip(places.tolist(), chosen.tolist(), strict=True):
            kept[place] = new[number]
        return kept

    fields = (field.name for field in dataclasses.fields(answers))
    return Rollouts(**{name: put(getattr(answers, name), getattr(others, name)) for name in fields})
