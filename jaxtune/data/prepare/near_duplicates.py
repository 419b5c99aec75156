"""Documents that are nearly an earlier one, by MinHash over shingles of words, are dropped."""

import pathlib
from collections.abc import Callable

import numpy as np

from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Dropped, Phase, Step, WholeCorpus, Work, minhash, shards, words
from jaxtune.data.prepare.assign_splits import Corpus
from jaxtune.data.prepare.remaining import Candidate
from jaxtune.data.prepare.shards import Stored

TASKS = 4  # the bands are looked through by so many tasks
_CHUNK = 1 << 16


class Signatures:
    """The signatures of a task's documents.

    Args:
      settings: `steps.dedup.near`, `.hashes` and `.ngram` are read.
    """

    def __init__(self, settings: Settings) -> None:
        dedup = settings.steps.dedup
        self.similarity, self.hashes, self.ngram = dedup.near, dedup.hashes, dedup.ngram
        self.signatures: list[np.ndarray] = []

    def add(self, document: Stored) -> None:
        """Takes in a document."""
        self.signatures.append(minhash.signature(words.word_hashes(document.text), self.ngram, self.hashes))

    def save(self, folder: pathlib.Path, rank: int) -> None:
        """Writes `bands/` uint64 `[bands, documents]` and `short/` uint8 `[documents, hashes]`."""
        signatures = np.array(self.signatures, np.uint32).reshape(-1, self.hashes)
        values = minhash.band_hashes(signatures, *minhash.bands(self.similarity, self.hashes))
        shards.save_array(folder / 'bands' / f'{rank:05d}.npy', np.ascontiguousarray(values.T))
        shards.save_array(folder / 'short' / f'{rank:05d}.npy', minhash.short(signatures))


def edges(corpus: Corpus, settings: Settings, task: int) -> np.ndarray:
    """Pairs of near-duplicates that some of the bands find, int64 `[pairs, 2]`."""
    similarity, hashes = settings.steps.dedup.near, settings.steps.dedup.hashes
    count, _ = minhash.bands(similarity, hashes)
    least = minhash.threshold(similarity, hashes)
    firsts = np.flatnonzero(corpus.originals() == np.arange(len(corpus)))
    parts = [np.zeros((0, 2), np.int64)]
    for band in range(task, count, TASKS):
        pairs = firsts[minhash.candidates(corpus.band(band)[firsts])]
        for start in range(0, len(pairs), _CHUNK):
            part = pairs[start : start + _CHUNK]
            alike = minhash.agreement(corpus.short(part[:, 0]), corpus.short(part[:, 1])) >= least
            parts.append(part[alike])
    return np.unique(np.concatenate(parts), axis=0)


def search(work: Work, rank: int) -> None:
    """Looks for them in some of the bands."""
    pairs = edges(Corpus(work.folder, work.tasks), work.plan.settings, rank)
    shards.save_array(work.folder / 'edges' / f'{rank:05d}.npy', pairs)


def pairs(work: Work) -> np.ndarray:
    """All pairs that were found, int64 `[pairs, 2]`."""
    return np.concatenate([np.load(work.folder / 'edges' / f'{task:05d}.npy') for task in range(TASKS)])


def _count(work: Work) -> int:
    return TASKS


def _judge(candidate: Candidate) -> str:
    return Dropped('nearly the same text before') if candidate.state == shards.NEAR else candidate.text


def _open(work: Work) -> Callable[[Candidate], str | None]:
    return _judge


STEP = Step(
    'near-duplicates',
    'MinHash over shingles of words',
    on=lambda settings: bool(settings.steps.dedup.near),
    corpus=WholeCorpus(
        _open,
        index=Signatures,
        before_splits=(Phase('near-duplicates', 'documents with equal bands of MinHash are compared', search, _count),),
    ),
)
