"""Gopher's rules of quality and repetition (Rae et al. 2021, appendix A.1), on word counts and hashes of n-grams.

The verdicts are those of datatrove's filters for the same words, a test holds them to it; strings are joined and
compared only where the counts leave a doubt, which makes them some ten times as fast.
"""

import dataclasses
import functools
import re
from collections import Counter

import numpy as np

from jaxtune.data.prepare import words

_PARAGRAPHS, _LINES = re.compile(r'\n{2,}'), re.compile(r'\n+')
_STOP_WORDS = frozenset(('the', 'be', 'to', 'of', 'and', 'that', 'have', 'with'))
_TOP = ((2, 0.20), (3, 0.18), (4, 0.16))
_DUPLICATED = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))


@functools.lru_cache(2)
def _tokens(text: str) -> list[str]:
    return words.tokens(text)


@functools.cache
def _punctuation() -> frozenset[str]:
    from datatrove.utils.text import PUNCTUATION_SET

    return frozenset(PUNCTUATION_SET)


@dataclasses.dataclass(frozen=True)
class Quality:
    """Bounds of the quality rules; None switches one off.

    Attributes:
      min_words, max_words: of words that are not punctuation alone.
      min_alphabetic: share of the words, punctuation counted as such, that must hold a letter.
      stop_words: how many of the eight English ones must occur.
    """

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_alphabetic: float = 0.8
    stop_words: int | None = 2

    def __call__(self, text: str) -> str:
        """Why a text goes; '' where it stays."""
        found = _tokens(text)
        counts, punctuation = Counter(found), _punctuation()
        spoken = {word: count for word, count in counts.items() if not punctuation.issuperset(word)}
        number = sum(spoken.values())
        if self.min_words and number < self.min_words:
            return f'under {self.min_words} words'
        if self.max_words and number > self.max_words:
            return f'over {self.max_words:,} words'
        mean = sum(len(word) * count for word, count in spoken.items()) / max(1, number)
        if mean < 3:
            return 'words under 3 letters on average'
        if mean > 10:
            return 'words over 10 letters on average'
        if text.count('#') > 0.1 * len(found):
            return 'too many hash signs'
        if text.count('...') + text.count('…') > 0.1 * len(found):
            return 'too many ellipses'
        lines = text.splitlines()
        if sum(line.lstrip().startswith(('•', '-')) for line in lines) > 0.9 * len(lines):
            return 'nine in ten lines are bullets'
        if sum(line.rstrip().endswith(('...', '…')) for line in lines) > 0.3 * len(lines):
            return 'three in ten lines end in an ellipsis'
        alphabetic = sum(count for word, count in counts.items() if any(map(str.isalpha, word)))
        if alphabetic < self.min_alphabetic * len(found):
            return 'too few words with a letter'
        if self.stop_words and len(_STOP_WORDS & counts.keys()) < self.stop_words:
            return 'too few stop words'
        return ''


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
        found = _tokens(text)
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        grams = _Grams(words.hashes_of(found), np.concatenate([[0], np.cumsum(lengths)]))
        for n, most in _TOP:
            if len(found) >= n and grams.top(n, most * len(text)) > most * len(text):
                return f'one {n}-gram over and over'
        for n, most in _DUPLICATED:
            # The bounds count overlapping repetitions each; only the walk through the text tells.
            doubtful = len(found) >= n and grams.repeated_at_most(n, most * len(text)) > most * len(text)
            if doubtful and _repeated(found, n) > most * len(text):
                return f'repeated {n}-grams'
        return ''


class _Grams:
    """Bounds on the repetition of n-grams, from hashes; a longer n-gram is repeated no more often than a shorter one.

    Args:
      hashes: of the words, `[words]`.
      ends: characters before each word, and in all, `[words + 1]`.
    """

    def __init__(self, hashes: np.ndarray, ends: np.ndarray):
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


def _repeated(found: list[str], n: int) -> int:
    """Characters of n-grams that stood there before, walking on behind each that did."""
    seen, characters, i = set(), 0, 0
    while i <= len(found) - n:
        gram = ''.join(found[i : i + n])
        if gram in seen:
            characters += len(gram)
            i += n
        else:
            seen.add(gram)
            i += 1
    return characters
