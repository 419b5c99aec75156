"""Gopher's rules of repetition (Rae et al. 2021, appendix A.1), on word counts and hashes of n-grams.

The verdicts are those of datatrove's filter for the same words, a test holds them to it; strings are joined and
compared only where the counts leave a doubt, which makes them some ten times as fast.
"""

import dataclasses
import re
from collections import Counter

import numpy as np

from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Document, Dropped, Step, words
from jaxtune.data.prepare import quality as presets

_PARAGRAPHS, _LINES = re.compile(r'\n{2,}'), re.compile(r'\n+')
_TOP = ((2, 0.20), (3, 0.18), (4, 0.16))
_DUPLICATED = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Bounds of the repetition rules.

    Attributes:
      lines, paragraphs: share of them that may be repeated.
      line_characters, paragraph_characters: share of the text in them.
    """

    lines: float = 0.3
    paragraphs: float = 0.3
    line_characters: float = 0.2
    paragraph_characters: float = 0.2

    def __call__(self, text: str) -> str:
        """Why a text goes; '' where it stays."""
        if not text.strip():
            return 'empty'
        paragraphs = _PARAGRAPHS.split(text.strip())
        count, characters = _duplicates(paragraphs)
        if count > self.paragraphs * len(paragraphs) or characters > self.paragraph_characters * len(text):
            return 'repeated paragraphs'
        lines = _LINES.split(text)
        count, characters = _duplicates(lines)
        if count > self.lines * len(lines) or characters > self.line_characters * len(text):
            return 'repeated lines'
        tokens = words.recent_tokens(text)
        lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
        grams = _Grams(words.hashes_of(tokens), np.concatenate([[0], np.cumsum(lengths)]))
        for n, most in _TOP:
            if len(tokens) >= n and grams.top(n, most * len(text)) > most * len(text):
                return f'one {n}-gram over and over'
        for n, most in _DUPLICATED:
            # The bounds count overlapping repetitions each; only the walk through the text tells.
            doubtful = len(tokens) >= n and grams.repeated_at_most(n, most * len(text)) > most * len(text)
            if doubtful and _repeated(tokens, n) > most * len(text):
                return f'repeated {n}-grams'
        return ''


class _Grams:
    """Bounds on the repetition of n-grams, from hashes; a longer n-gram is repeated no more often than a shorter one.

    Args:
      hashes: of the words, `[words]`.
      ends: characters before each word, and in all, `[words + 1]`.
    """

    def __init__(self, hashes: np.ndarray, ends: np.ndarray) -> None:
        self.hashes, self.ends = hashes, ends
        self.most: int | None = None
        self.again: np.ndarray | None = None

    def top(self, n: int, enough: float) -> int:
        """Characters of the commonest n-gram, spaces between its words counted, times its number.

        An upper bound of that, where it is not above `enough`.
        """
        sizes = self.ends[n:] - self.ends[:-n] + n - 1
        if self.most is not None and (bound := int(self.most * sizes.max())) <= enough:
            return bound
        grams = words.shingles(self.hashes, n)
        ordered = np.sort(grams)
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
        counts = np.diff(starts)
        self.most = int(counts.max())
        if (bound := int(self.most * sizes.max())) <= enough:
            return bound
        often = ordered[starts[:-1][counts == self.most]]
        return int(sizes[np.flatnonzero(np.isin(grams, often))[0]] * self.most)

    def repeated_at_most(self, n: int, enough: float) -> int:
        """Characters of all n-grams that stood there before; an upper bound, where it is not above `enough`."""
        sizes = self.ends[n:] - self.ends[:-n]
        if self.again is None:
            self.again = self._again(n)
        bound = int(sizes[self.again[: len(sizes)]].sum())
        if bound <= enough or n == _DUPLICATED[0][0]:
            return bound
        return int(sizes[self._again(n)].sum())

    def _again(self, n: int) -> np.ndarray:
        """Whether each n-gram stood there before, bool `[words - n + 1]`."""
        grams = words.shingles(self.hashes, n)
        order = np.argsort(grams, kind='stable')
        ordered = grams[order]
        again = np.zeros(len(grams), bool)
        again[order[1:][ordered[1:] == ordered[:-1]]] = True
        return again


def _duplicates(parts: list[str]) -> tuple[int, int]:
    """How many parts stood there before, and their characters."""
    counts = Counter(parts)
    if len(counts) == len(parts):
        return 0, 0
    return len(parts) - len(counts), sum(len(part) * (count - 1) for part, count in counts.items())


def _repeated(tokens: list[str], n: int) -> int:
    """Characters of n-grams that stood there before, walking on behind each that did."""
    seen, characters, i = set(), 0, 0
    while i <= len(tokens) - n:
        gram = ''.join(tokens[i : i + n])
        if gram in seen:
            characters += len(gram)
            i += n
        else:
            seen.add(gram)
            i += 1
    return characters


_WEB = Repetition()
_BOOKS = Repetition(0.5, 0.5, 0.4, 0.4)  # verse repeats lines


def repetition(document: Document, settings: Settings) -> str:
    """The text where little of it is repeated; books may repeat more than pages."""
    rules = _BOOKS if presets.preset(document, settings) == 'books' else _WEB
    why = rules(document.text)
    return Dropped(why) if why else document.text


STEP = Step(
    'gopher repetition',
    'lines, paragraphs and phrases said again',
    repetition,
    applies=presets.of_preset('web', 'books'),
)
