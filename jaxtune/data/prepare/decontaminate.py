"""Decontamination: text that evaluation files hold must not be trained on (Brown et al. 2020, appendix C)."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Document, Dropped, Step, words
from jaxtune.data.records import open_records

# Shorter evaluation texts are no sign of anything: they are found everywhere.
_FEWEST_WORDS = 8


@dataclasses.dataclass(frozen=True)
class Index:
    """Hashes of the runs of words that evaluation files hold.

    Attributes:
      runs: length in words -> sorted hashes, uint64. Texts shorter than the n-gram are looked for whole.
    """

    runs: dict[int, np.ndarray]

    def finds(self, hashes: np.ndarray) -> bool:
        """Whether a document with these word hashes shares a run of words."""
        for length, known in self.runs.items():
            if len(hashes) < length:
                continue
            shingles = words.shingles(hashes, length)
            at = np.minimum(np.searchsorted(known, shingles), len(known) - 1)
            if np.any(known[at] == shingles):
                return True
        return False


def index(paths: Iterable[str], ngram: int) -> Index:
    """Reads evaluation files; of a record, every field that is text is looked for by itself.

    Raises:
      UserError: a file is not there or is damaged.
    """
    runs: dict[int, list[np.ndarray]] = {}
    for path in paths:
        for _, record in open_records(path, 'data.steps.decontaminate.against'):
            for text in texts(record):
                hashes = words.word_hashes(text)
                if len(hashes) >= _FEWEST_WORDS:
                    length = min(ngram, len(hashes))
                    runs.setdefault(length, []).append(words.shingles(hashes, length))
    return Index({length: np.unique(np.concatenate(parts)) for length, parts in sorted(runs.items())})


def texts(record: Any) -> Iterator[str]:
    """Every text in a record, in order."""
    if isinstance(record, str):
        yield record
    elif isinstance(record, dict):
        for value in record.values():
            yield from texts(value)
    elif isinstance(record, list):
        for value in record:
            yield from texts(value)


@functools.lru_cache(1)
def _index(paths: tuple[str, ...], ngram: int) -> Index:
    return index(paths, ngram)


def _opened(settings: Settings) -> Index:
    asked = settings.steps.decontaminate
    return _index(asked.against, asked.ngram)


def unseen(document: Document, settings: Settings) -> str:
    """The text where it shares no run of words with an evaluation file."""
    hashes = words.word_hashes(document.text)
    return Dropped('holds evaluation text') if _opened(settings).finds(hashes) else document.text


STEP = Step(
    'decontaminate',
    'text that evaluation files hold',
    unseen,
    on=lambda settings: bool(settings.steps.decontaminate.against),
    load=lambda settings: _opened(settings) and None,
)
