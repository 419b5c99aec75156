"""Paragraphs that many documents hold are boilerplate: they stay in the first of them only."""

import hashlib
import pathlib
from collections.abc import Callable

import numpy as np

from jaxtune.common.settings import Settings
from jaxtune.data.prepare import Step, WholeCorpus, Work, shards, shared_text
from jaxtune.data.prepare.assign_splits import Corpus
from jaxtune.data.prepare.remaining import Candidate


def paragraph_hashes(text: str) -> tuple[np.ndarray, list[str]]:
    """A hash of each line that is long enough to be boilerplate, uint64 `[lines]`, 0 for one that is not; the lines."""
    lines = text.split('\n')
    hashes = np.zeros(len(lines), np.uint64)
    for i, line in enumerate(lines):
        stripped = line.strip()
        if len(stripped) >= 15:
            data = hashlib.blake2b(' '.join(stripped.split()).encode('utf-8', 'surrogatepass'), digest_size=8).digest()
            hashes[i] = int.from_bytes(data, 'little') | 1
    return hashes, lines


class Lines:
    """The hashes of the lines of a task's documents."""

    def __init__(self) -> None:
        self.hashes = [np.zeros(0, np.uint64)]
        self.counts: list[int] = []

    def add(self, document: shards.Stored) -> None:
        """Takes in a document."""
        hashes = np.zeros(0, np.uint64)
        if document.kind not in shared_text.WHOLE:
            hashes, _ = paragraph_hashes(document.text)
            hashes = hashes[hashes > 0]
        self.hashes.append(hashes)
        self.counts.append(len(hashes))

    def save(self, folder: pathlib.Path, rank: int) -> None:
        """Writes `lines/`: `hash` of each line, `count` of each document's lines."""
        path = folder / 'lines' / f'{rank:05d}.npz'
        shards.save(path, hash=np.concatenate(self.hashes), count=np.array(self.counts, np.int64))


def search(work: Work, corpus: Corpus, state: np.ndarray) -> None:
    """Looks for paragraphs that more kept documents hold than `data.steps.dedup.paragraphs`.

    Args:
      work: the folder between the phases, and the plan.
      corpus: all documents.
      state: what becomes of each, `[documents]`.
    """
    most = work.plan.settings.steps.dedup.paragraphs
    hashes, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for rank in range(corpus.tasks):
        part = shards.load(work.folder / 'lines' / f'{rank:05d}.npz')
        owner = corpus.starts[rank] + np.repeat(np.arange(len(part['count'])), part['count'])
        stays = state[owner] == shards.KEPT
        hashes.append(part['hash'][stays])
        owners.append(owner[stays])
    values, owner = np.concatenate(hashes), np.concatenate(owners)
    order = np.lexsort((owner, values))
    values, owner = values[order], owner[order]
    new = shared_text.starts(values) | shared_text.starts(owner)
    values, owner = values[new], owner[new]  # once a document
    repeated, first, counts = np.unique(values, return_index=True, return_counts=True)
    shards.save(work.folder / 'paragraphs.npz', hash=repeated[counts > most], first=owner[first][counts > most])


class Paragraphs:
    """Cuts lines that more documents hold than the recipe allows."""

    def __init__(self, work: pathlib.Path) -> None:
        self.known = shared_text.Known(**shards.load(work / 'paragraphs.npz'))

    def cut(self, text: str, number: int) -> str:
        """The text of document `number` without them."""
        hashes, lines = paragraph_hashes(text)
        goes = self.known.elsewhere(hashes, number)
        if not goes.any():
            return text
        return '\n'.join(line for line, gone in zip(lines, goes.tolist(), strict=True) if not gone)


def _index(settings: Settings) -> Lines:
    return Lines()


def _open(work: Work) -> Callable[[Candidate], str | None]:
    return shared_text.judge(Paragraphs(work.folder), 'little but repeated paragraphs', work.plan)


STEP = Step(
    'paragraphs',
    'lines that many documents share',
    on=lambda settings: bool(settings.steps.dedup.paragraphs),
    corpus=WholeCorpus(_open, index=_index, at_splits=search),
)
