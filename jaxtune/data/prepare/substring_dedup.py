"""Text that documents share, cut from all but the first of them: paragraphs, and substrings of so many words.

A paragraph that many pages hold is boilerplate; a long substring that two documents hold is a quotation, a licence, a
reprint (Lee et al. 2022, "Deduplicating training data makes language models better", section 4.1).
"""

import pathlib

import numpy as np

from jaxtune.data.prepare import shards, words
from jaxtune.data.prepare.assign_splits import Corpus, paragraph_hashes

WHOLE = ('code', 'records')  # kinds of documents that nothing is cut from
SUBSTRING_TASKS = 8  # the hashes are looked through by so many tasks
_SHIFT = np.uint64(61)  # the upper bits of a hash say which of them


class _Known:
    """Hashes that several documents hold, and in which each stays.

    Args:
      hash: sorted uint64 `[hashes]`.
      first: numbers of documents, int64 `[hashes]`.
    """

    def __init__(self, hash: np.ndarray, first: np.ndarray):
        self.hash, self.first = hash, first

    def elsewhere(self, hashes: np.ndarray, number: int) -> np.ndarray:
        """Which hashes of document `number` stay in another, bool `[len(hashes)]`."""
        if not len(self.hash):
            return np.zeros(len(hashes), bool)
        at = np.minimum(np.searchsorted(self.hash, hashes), len(self.hash) - 1)
        return (self.hash[at] == hashes) & (self.first[at] != number)


class Paragraphs:
    """Cuts lines that more documents hold than the recipe allows."""

    name, reason = 'paragraphs', 'little but repeated paragraphs'

    def __init__(self, work: pathlib.Path):
        self.known = _Known(**shards.load(work / 'paragraphs.npz'))

    def cut(self, text: str, number: int) -> str:
        """The text of document `number` without them."""
        hashes, lines = paragraph_hashes(text)
        goes = self.known.elsewhere(hashes, number)
        if not goes.any():
            return text
        return '\n'.join(line for line, gone in zip(lines, goes.tolist(), strict=True) if not gone)


def paragraphs(work: pathlib.Path, corpus: Corpus, state: np.ndarray, most: int) -> None:
    """Finds paragraphs that more than `most` kept documents hold.

    Args:
      work: the folder between the phases.
      corpus: all documents.
      state: what becomes of each, `[documents]`.
      most: documents that may hold the same.
    """
    hashes, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for rank in range(corpus.tasks):
        part = shards.load(work / 'index' / f'{rank:05d}.npz')
        owner = corpus.starts[rank] + np.repeat(np.arange(len(part['lines'])), part['lines'])
        stays = state[owner] == shards.KEPT
        hashes.append(part['paragraphs'][stays])
        owners.append(owner[stays])
    values, owner = np.concatenate(hashes), np.concatenate(owners)
    order = np.lexsort((owner, values))
    values, owner = values[order], owner[order]
    new = _starts(values) | _starts(owner)
    values, owner = values[new], owner[new]  # once a document
    found, first, counts = np.unique(values, return_index=True, return_counts=True)
    shards.save(work / 'paragraphs.npz', hash=found[counts > most], first=owner[first][counts > most])


class Substrings:
    """Cuts runs of at least `length` words that an earlier document holds, whatever stands between the words."""

    name, reason = 'substrings', 'little but what stands elsewhere'

    def __init__(self, work: pathlib.Path, length: int):
        parts = [shards.load(work / 'substrings' / f'{rank:05d}.npz') for rank in range(SUBSTRING_TASKS)]
        self.known = _Known(*(np.concatenate([part[name] for part in parts]) for name in ('hash', 'first')))
        self.length = length

    def cut(self, text: str, number: int) -> str:
        """The text of document `number` without them."""
        goes = self.known.elsewhere(windows(text, self.length), number)
        if not goes.any():
            return text
        edges = np.zeros(len(goes) + self.length, np.int64)
        np.add.at(edges, np.flatnonzero(goes), 1)
        np.add.at(edges, np.flatnonzero(goes) + self.length, -1)
        inside = np.concatenate([[False], np.cumsum(edges[:-1]) > 0, [False]])
        begins, ends = np.flatnonzero(inside[1:] & ~inside[:-1]), np.flatnonzero(inside[:-1] & ~inside[1:])
        starts = [*words.starts(text), len(text)]
        pieces, at = [], 0
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            pieces.append(text[at : starts[begin]])
            at = starts[end]
        return ''.join([*pieces, text[at:]])


def windows(text: str, length: int) -> np.ndarray:
    """A hash of each run of `length` words, uint64 `[words - length + 1]`; none of a shorter text."""
    hashes = words.hashes_of(words.in_place(text))
    return words.shingles(hashes, length) if len(hashes) >= length else np.zeros(0, np.uint64)


class Windows:
    """The runs of words of a task's documents.

    Args:
      length: words in a run.
    """

    def __init__(self, length: int):
        self.length, self.hashes, self.owners = length, [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]

    def add(self, text: str, number: int) -> None:
        """Takes in document `number`; numbers ascend."""
        found = np.unique(windows(text, self.length))
        self.hashes.append(found)
        self.owners.append(np.full(len(found), number, np.uint64))

    def merged(self) -> np.ndarray:
        """Uint64 `[2, hashes]`: the hashes, sorted; twice the number of the first document, plus 1 if it has others."""
        hashes, first, several = _merge(np.concatenate(self.hashes), np.concatenate(self.owners) * np.uint64(2))
        return np.stack([hashes, first | several])


def substrings(work: pathlib.Path, tasks: int, task: int) -> None:
    """Finds runs of words that several documents hold, among a share of the hashes.

    Args:
      work: the folder between the phases.
      tasks: how many `windows` there are.
      task: which share, below `SUBSTRING_TASKS`.
    """
    found = [np.zeros((2, 0), np.uint64)]
    for rank in range(tasks):
        part = np.load(work / 'windows' / f'{rank:05d}.npy', mmap_mode='r')
        begin, end = (np.searchsorted(part[0], np.uint64(share) << _SHIFT) for share in (task, task + 1))
        found.append(part[:, begin : end if task + 1 < SUBSTRING_TASKS else None])
    hashes, first, several = _merge(*np.concatenate(found, axis=1))
    here = several > 0
    shards.save(
        work / 'substrings' / f'{task:05d}.npz', hash=hashes[here], first=(first[here] >> np.uint64(1)).astype(np.int64)
    )


def _merge(hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each hash once, sorted; its first owner, without the lowest bit; 1 where it has others or an owner had that bit.

    Args:
      hashes: uint64 `[n]`.
      owners: uint64 `[n]`; those of one hash ascend.
    """
    order = np.argsort(hashes, kind='stable')
    hashes, owners = hashes[order], owners[order]
    begins = np.flatnonzero(_starts(hashes))
    one = np.uint64(1)
    several = np.bitwise_or.reduceat(owners & one, begins) if len(begins) else np.zeros(0, np.uint64)
    several |= (np.diff(np.append(begins, len(hashes))) > 1).astype(np.uint64)
    return hashes[begins], owners[begins] & ~one, several


def _starts(values: np.ndarray) -> np.ndarray:
    """Where a value differs from the one before, bool `[n]`."""
    return np.concatenate([[True], values[1:] != values[:-1]]) if len(values) else np.zeros(0, bool)
