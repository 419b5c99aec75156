"""Runs of words that an earlier document holds are cut: quotations, licences, reprints.

Lee et al. 2022, "Deduplicating training data makes language models better", section 4.1.
"""

import pathlib
from collections.abc import Callable

import numpy as np

from jaxtune.data.prepare import Phase, Step, WholeCorpus, Work, shards, shared_text, task_of_each_source_part, words
from jaxtune.data.prepare.remaining import Candidate, Remaining

SUBSTRING_TASKS = 8  # the hashes are looked through by so many tasks
_SHIFT = np.uint64(61)  # the upper bits of a hash say which of them


class Substrings:
    """Cuts runs of at least `length` words that an earlier document holds, whatever stands between the words."""

    def __init__(self, work: pathlib.Path, length: int) -> None:
        parts = [shards.load(work / 'substrings' / f'{rank:05d}.npz') for rank in range(SUBSTRING_TASKS)]
        self.known = shared_text.Known(*(np.concatenate([part[name] for part in parts]) for name in ('hash', 'first')))
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

    def __init__(self, length: int) -> None:
        self.length, self.hashes, self.owners = length, [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]

    def add(self, text: str, number: int) -> None:
        """Takes in document `number`; numbers ascend."""
        hashes = np.unique(windows(text, self.length))
        self.hashes.append(hashes)
        self.owners.append(np.full(len(hashes), number, np.uint64))

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
    parts = [np.zeros((2, 0), np.uint64)]
    for rank in range(tasks):
        part = np.load(work / 'windows' / f'{rank:05d}.npy', mmap_mode='r')
        begin, end = (np.searchsorted(part[0], np.uint64(share) << _SHIFT) for share in (task, task + 1))
        parts.append(part[:, begin : end if task + 1 < SUBSTRING_TASKS else None])
    hashes, first, several = _merge(*np.concatenate(parts, axis=1))
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
    begins = np.flatnonzero(shared_text.starts(hashes))
    one = np.uint64(1)
    several = np.bitwise_or.reduceat(owners & one, begins) if len(begins) else np.zeros(0, np.uint64)
    several |= (np.diff(np.append(begins, len(hashes))) > 1).astype(np.uint64)
    return hashes[begins], owners[begins] & ~one, several


def collect_windows(work: Work, rank: int) -> None:
    """Hashes the runs of words of a task's documents."""
    windows = Windows(work.plan.settings.steps.dedup.substring)
    for candidate in Remaining(work, rank, without=STEP.name):
        if candidate.document.kind not in shared_text.WHOLE:
            windows.add(candidate.text, candidate.number)
    shards.save_array(work.folder / 'windows' / f'{rank:05d}.npy', windows.merged())


def search(work: Work, rank: int) -> None:
    """Looks for runs that several documents hold, among some of the hashes."""
    substrings(work.folder, work.tasks, rank)


def _count(work: Work) -> int:
    return SUBSTRING_TASKS


def _open(work: Work) -> Callable[[Candidate], str | None]:
    cutter = Substrings(work.folder, work.plan.settings.steps.dedup.substring)
    return shared_text.judge(cutter, 'little but what stands elsewhere', work.plan)


STEP = Step(
    'substrings',
    'runs of words that an earlier document holds',
    on=lambda settings: bool(settings.steps.dedup.substring),
    corpus=WholeCorpus(
        _open,
        after_splits=(
            Phase('windows', 'runs of words are hashed', collect_windows, task_of_each_source_part),
            Phase('substrings', 'runs that several documents hold are looked for', search, _count),
        ),
    ),
)
