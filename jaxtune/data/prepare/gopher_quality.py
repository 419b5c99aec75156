"""Gopher's rules of quality (Rae et al. 2021, appendix A.1): words, symbols and lines as prose has them.

The verdicts are those of datatrove's filter for the same words; a test holds them to it.
"""

import dataclasses
import functools
from collections import Counter

from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Document, Dropped, Step, words
from jaxtune.data.prepare import quality as presets

_STOP_WORDS = frozenset(('the', 'be', 'to', 'of', 'and', 'that', 'have', 'with'))


@functools.cache
def _punctuation() -> frozenset[str]:
    from datatrove.utils.text import PUNCTUATION_SET  # of the data extra

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
        tokens = words.recent_tokens(text)
        counts, punctuation = Counter(tokens), _punctuation()
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
        if text.count('#') > 0.1 * len(tokens):
            return 'too many hash signs'
        if text.count('...') + text.count('…') > 0.1 * len(tokens):
            return 'too many ellipses'
        lines = text.splitlines()
        if sum(line.lstrip().startswith(('•', '-')) for line in lines) > 0.9 * len(lines):
            return 'nine in ten lines are bullets'
        if sum(line.rstrip().endswith(('...', '…')) for line in lines) > 0.3 * len(lines):
            return 'three in ten lines end in an ellipsis'
        alphabetic = sum(count for word, count in counts.items() if any(map(str.isalpha, word)))
        if alphabetic < self.min_alphabetic * len(tokens):
            return 'too few words with a letter'
        if self.stop_words and len(_STOP_WORDS & counts.keys()) < self.stop_words:
            return 'too few stop words'
        return ''


@functools.cache
def _rules(books: bool, english: bool) -> Quality:
    # Gopher's stop words are English; in other languages that rule would drop everything.
    stop_words = 2 if english else None
    # Dialogue in books is a quarter punctuation.
    return Quality(20, None, 0.6, stop_words) if books else Quality(stop_words=stop_words)


def quality(document: Document, settings: Settings) -> str:
    """The text where it reads like prose; what that is depends on the preset and the language."""
    books = presets.preset(document, settings) == 'books'
    why = _rules(books, document.metadata.get('language', '') in ('', 'en'))(document.text)
    return Dropped(why) if why else document.text


STEP = Step(
    'gopher quality',
    'words, symbols and lines as prose has them',
    quality,
    applies=presets.of_preset('web', 'books'),
)
