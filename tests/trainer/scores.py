"""Rewards for tests, as a person would hand them in: `rl.reward=scores:...`."""


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
