"""Texts that end an answer, however the tokenizer cuts them: an automaton over tokens, and where a text was reached."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np


def automaton(tokenizer: Any, stops: Sequence[str], vocab_size: int) -> np.ndarray:
    """The automaton that reads tokens until one of the texts has been written (Aho and Corasick 1975).

    A token is read as the text that it decodes to by itself. Where that is not what it adds to others, as of parts of a
    character, the automaton may see a text too early or not at all; `reached` tells.

    Args:
      tokenizer: decodes tokens.
      stops: the texts, none of them empty.
      vocab_size: rows of the model.

    Returns:
      `[states, vocab_size]` int16, the state after each token; 0 is the first one, and the last one, which it stays
      in, is that a text has been written.
    """
    steps, final = _of_letters(stops)
    states, letters = len(steps), set(''.join(stops))
    table = np.zeros((states + 1, vocab_size), np.int16)
    table[states] = states
    for token in range(min(vocab_size, len(tokenizer))):
        text = tokenizer.decode([token])
        if not letters.intersection(text):
            continue
        for state in range(states):
            now = state
            for letter in text:
                now = steps[now].get(letter, 0)
                if final[now]:
                    now = states
                    break
            table[state, token] = now
    return table


def _of_letters(stops: Sequence[str]) -> tuple[list[dict[str, int]], list[bool]]:
    """The automaton over letters: the next state by letter (0 where there is none), and where a text has ended."""
    children: list[dict[str, int]] = [{}]
    final = [False]
    for stop in stops:
        state = 0
        for letter in stop:
            if letter not in children[state]:
                children[state][letter] = len(children)
                children.append({})
                final.append(False)
            state = children[state][letter]
        final[state] = True
    steps, fallback = [dict(own) for own in children], [0] * len(children)
    waiting = collections.deque(children[0].values())
    while waiting:
        state = waiting.popleft()
        final[state] = final[state] or final[fallback[state]]
        for letter, child in children[state].items():
            fallback[child] = steps[fallback[state]].get(letter, 0)
            waiting.append(child)
        steps[state] = steps[fallback[state]] | children[state]
    return steps, final


def reached(tokenizer: Any, tokens: Sequence[int], stops: Sequence[str]) -> int:
    """How many tokens of an answer there are when the first of the texts has been written; 0 where none has."""

    def holds(count: int) -> bool:
        text = tokenizer.decode(tokens[:count], skip_special_tokens=False)
        return any(stop in text for stop in stops)

    if not stops or not holds(len(tokens)):
        return 0
    low, high = 0, len(tokens)  # without, with
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
