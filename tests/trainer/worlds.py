"""Environments for tests, as a person would hand them in: `rl.environment=worlds:...`."""

import dataclasses
import os
import string

from jaxtune.rl import Environment

steps = 0


def reset(problem):
    return {'said': []}


def step(state, text):
    """Counts the letters e of a turn, and says how many there have been; three turns are the most."""
    state['said'].append(text.count('e'))
    return state, f'({sum(state["said"])})', float(text.count('e')), len(state['said']) == 3


def fails_once(state, text):
    """As `step`, and raises from the call on whose number is in the environment."""
    global steps
    steps += 1
    if steps > int(os.environ.get('FAILS_AT_STEP', '100000')):
        raise ValueError('now')
    return step(state, text)


LETTERS = Environment('letters', reset, step, stops=tuple(string.ascii_letters))
FAILS_ONCE = dataclasses.replace(LETTERS, step=fails_once)
number = 3
