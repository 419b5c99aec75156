"""The environment `guess`: a number from 1 to 100 is to be found; the model writes `<guess>50</guess>`.

` higher` or ` lower` is added until it is found, which is worth 1. The record's answer holds the number; where it holds
none, the prompt decides. A turn without the tags may guess, too: its last number counts.
"""

import hashlib
import re
from typing import Any

from jaxtune.rl import Environment, Problem

_MOST = 100
_NUMBER = re.compile(r'\d{1,9}')


def reset(problem: Problem) -> dict[str, int]:
    """The number that is to be found."""
    if problem.reference and (match := _NUMBER.search(problem.reference)):
        return {'number': int(match[0])}
    return {'number': int.from_bytes(hashlib.sha256(str(problem.prompt).encode()).digest()[:8], 'big') % _MOST + 1}


def step(state: dict[str, int], text: str) -> tuple[dict[str, Any], str | None, float, bool]:
    """Whether the last number of a turn is it; a turn without a number is the last."""
    guesses = _NUMBER.findall(text)
    if not guesses:
        return state, None, 0.0, True
    guess, number = int(guesses[-1]), state['number']
    if guess == number:
        return state, None, 1.0, True
    inline = ' ' if text.rstrip().endswith('</guess>') else ''
    return state, f'{inline}{"higher" if guess < number else "lower"}', 0.0, False


ENVIRONMENT = Environment('guess', reset, step, stops=('</guess>',), role='user')
