"""Rewards for tests, as a person would hand them in: `rl.reward=scores:...`."""

import os

calls = 0


def letters(prompts, completions, references):
    """How often an answer has the letter e."""
    assert len(prompts) == len(completions) == len(references)
    return [text.count('e') for text in completions]


def alike(prompts, completions, references):
    return [0.7] * len(completions)


def common(completions, **_):
    """Whether an answer has a common letter: one in a few, so that some groups are all alike."""
    return [float(any(letter in text for letter in 'etaoin')) for text in completions]


def one(prompts, completions, references):
    return [1.0]


def nothing(prompts, completions, references):
    return [float('nan')] * len(completions)


def fails(prompts, completions, references):
    return [len(text) / 0 for text in completions]


number = 3


def fails_once(completions, **_):
    """As `letters`, and raises from the call on whose number is in the environment."""
    global calls
    calls += 1
    if calls > int(os.environ.get('FAILS_AT_CALL', '1000')):
        raise ValueError('now')
    return [text.count('e') for text in completions]
