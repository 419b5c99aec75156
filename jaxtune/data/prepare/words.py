"""Words and shingles: how text is split for rules and for comparison, in languages with spaces and without."""

import functools
import re
from typing import Any

import numpy as np

# Han, kana and the like: scripts written without spaces, where one character stands for a word.
UNSPACED = '\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff'
_TOKENS = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+(?:[.,:'’-][^\W_{UNSPACED}]+)*|[^\w\s]+|_+")
_WORDS = re.compile(rf'[{UNSPACED}]|[^\W_{UNSPACED}]+')
_ASCII_WORDS = re.compile(r'[a-z0-9]+')
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_CACHE_ENTRIES = 1 << 17


def tokens(text: str) -> list[str]:
    """Words and runs of punctuation, in order; a character of an unspaced script is a word."""
    return _TOKENS.findall(text)


@functools.lru_cache(2)
def recent_tokens(text: str) -> list[str]:
    """The same, remembered for the next rule that looks at the same text; not to be changed."""
    return tokens(text)


def words(text: str) -> list[str]:
    """Words in lower case without punctuation: what two documents are compared by."""
    if text.isascii():
        return _ASCII_WORDS.findall(text.lower())
    return _WORDS.findall(text.lower())


def in_place(text: str) -> list[str]:
    """The words of `words`, as many as `starts` has."""
    return [word.lower() for word in _WORDS.findall(text)]


def starts(text: str) -> list[int]:
    """Where each word begins."""
    return [match.start() for match in _WORDS.finditer(text)]


class _Hashes(dict):
    """Word -> 64-bit hash, remembered."""

    def __missing__(self, word: str) -> int:
        import xxhash  # of the data extra

        if len(self) >= _CACHE_ENTRIES:
            self.clear()
        value = self[word] = xxhash.xxh64_intdigest(word.encode('utf-8', 'surrogatepass'))
        return value


_hashes = _Hashes()


def word_hashes(text: str) -> np.ndarray:
    """A hash a word, uint64 `[words]`; the same on every machine."""
    return hashes_of(words(text))


def hashes_of(word_list: list[str]) -> np.ndarray:
    """A hash a word, uint64 `[words]`."""
    return np.fromiter(map(_hashes.__getitem__, word_list), np.uint64, len(word_list))


def shingles(hashes: np.ndarray, n: int) -> np.ndarray:
    """A hash of every `n` words in a row, uint64 `[words - n + 1]`; of all words where there are fewer.

    Args:
      hashes: of the words, `word_hashes`.
      n: words in a shingle.
    """
    n = min(n, len(hashes))
    if not n:
        return np.zeros(0, np.uint64)
    count = len(hashes) - n + 1
    mixed = np.zeros(count, np.uint64)
    for i in range(n):
        mixed *= _MULTIPLIER
        mixed ^= hashes[i : i + count]
        mixed ^= mixed >> np.uint64(29)
    return mix(mixed)


def mix(values: np.ndarray) -> np.ndarray:
    """Spreads 64-bit values evenly: the finaliser of MurmurHash3 (Appleby 2011)."""
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))


@functools.cache
def splitter() -> Any:
    """Our split into words for datatrove's rules, which take theirs from large language packages."""
    from datatrove.utils.word_tokenizers import WordTokenizer  # of the data extra

    class Splitter(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return tokens(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return [part for part in _SENTENCES.split(text) if part.strip()]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            ends = [match.end() for match in _SENTENCES.finditer(text)] + [len(text)]
            return list(zip([0, *ends[:-1]], ends, strict=True))

    return Splitter()


_SENTENCES = re.compile(r'(?<=[.!?…])["\'”’)\]]*\s+|(?<=[。！？])["\'”’」』]*|\n+')
