"""The split of each document, once all are known: duplicates are dropped, the rest is trained on or held out."""

import hashlib
import pathlib

import numpy as np

from jaxtune.data.prepare import minhash, shards
from jaxtune.data.prepare.plan import Plan
from jaxtune.errors import UserError

DROPPED, TRAIN, EVAL = 0, 1, 2


def digest(text: str) -> np.ndarray:
    """128 bits of a text whose white space does not count, uint64 `[2]`."""
    data = hashlib.blake2b(' '.join(text.split()).encode('utf-8', 'surrogatepass'), digest_size=16).digest()
    return np.frombuffer(data, '<u8')


class Digests:
    """What the assignment of splits must know of a task's documents."""

    def __init__(self) -> None:
        self.digests: list[np.ndarray] = []
        self.groups: list[int] = []
        self.bytes: list[int] = []
        self.sources: list[int] = []

    def add(self, document: shards.Stored) -> None:
        """Takes in a document."""
        own = digest(document.text)
        group = document.metadata.get('group')
        self.digests.append(own)
        self.groups.append(digest(group)[0] if group else own[0])
        self.bytes.append(len(document.text.encode()))
        self.sources.append(document.source)

    def save(self, folder: pathlib.Path, rank: int) -> None:
        """Writes `index/`: arrays `[documents]`, `digest` `[documents, 2]`."""
        shards.save(
            folder / 'index' / f'{rank:05d}.npz',
            digest=np.array(self.digests, np.uint64).reshape(-1, 2),
            group=np.array(self.groups, np.uint64),
            bytes=np.array(self.bytes, np.int64),
            source=np.array(self.sources, np.int32),
        )


class Corpus:
    """The indexes of all tasks as one.

    Args:
      work: the folder between the phases.
      tasks: how many there are.
    """

    def __init__(self, work: pathlib.Path, tasks: int) -> None:
        self.work, self.tasks = work, tasks
        parts = [shards.load(work / 'index' / f'{rank:05d}.npz') for rank in range(tasks)]
        self.counts = np.array([len(part['bytes']) for part in parts], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        self.digests = np.concatenate([part['digest'] for part in parts])
        self.groups = np.concatenate([part['group'] for part in parts])
        self.sources = np.concatenate([part['source'] for part in parts])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def originals(self) -> np.ndarray:
        """For each document the first with the same text, int64 `[documents]`."""
        both = np.ascontiguousarray(self.digests).view([('a', '<u8'), ('b', '<u8')]).reshape(-1)
        _, first, inverse = np.unique(both, return_index=True, return_inverse=True)
        return first[inverse.reshape(-1)].astype(np.int64) if len(both) else np.zeros(0, np.int64)

    def band(self, number: int) -> np.ndarray:
        """One band's values, uint64 `[documents]`."""
        parts = [np.load(self.work / 'bands' / f'{rank:05d}.npy', mmap_mode='r') for rank in range(self.tasks)]
        return np.concatenate([part[number] for part in parts])

    def short(self, documents: np.ndarray) -> np.ndarray:
        """Short signatures of some documents, uint8 `[len(documents), hashes]`, read from where they lie."""
        tasks = np.searchsorted(self.starts, documents, side='right') - 1
        rows = np.empty((0, 0), np.uint8)
        for task in np.unique(tasks):
            part = np.load(self.work / 'short' / f'{task:05d}.npy', mmap_mode='r')
            if not rows.size:
                rows = np.empty((len(documents), part.shape[1]), np.uint8)
            here = tasks == task
            rows[here] = part[documents[here] - self.starts[task]]
        return rows


def held_out(kept: np.ndarray, scores: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out, bool `[documents]`: those whose score is below the fraction.

    The same documents always get the same split, and others that come move none of them. Where anything is held out,
    both splits get at least one document.

    Args:
      kept: which documents stay at all, bool `[documents]`.
      scores: a hash of each as a number in 0 … 1, `[documents]`; those of equal score stay together.
      fraction: share to hold out; 0 = none.
    """
    if not fraction:
        return np.zeros(len(kept), bool)
    chosen = kept & (scores < fraction)
    chosen |= kept & (scores == scores[kept].min())
    if chosen.sum() == kept.sum():
        chosen &= scores < scores[kept].max()
    return chosen


def assign_splits(corpus: Corpus, plan: Plan, pairs: np.ndarray) -> dict[str, np.ndarray]:
    """Which documents are duplicates, and the split of each of the others.

    Args:
      corpus: all of them.
      plan: weights of the sources, the share to hold out.
      pairs: near-duplicates, `[pairs, 2]`.

    Returns:
      `state` (`shards.KEPT`, `EXACT`, `NEAR`), `side` (`DROPPED`, `TRAIN`, `EVAL`) and `copies`, each `[documents]`.

    Raises:
      UserError: too little is left.
    """
    count = len(corpus)
    originals = corpus.originals()
    state = np.where(originals == np.arange(count), shards.KEPT, shards.EXACT).astype(np.uint8)
    if len(pairs):
        near = minhash.clusters(count, pairs) != np.arange(count)
        state[near & (state == shards.KEPT)] = shards.NEAR
    kept = state == shards.KEPT
    fraction = plan.keys['eval_fraction']
    if kept.sum() < (2 if fraction else 1):
        raise UserError(
            f'data.sources: {kept.sum()} documents are left of {count} that passed the filters; expected at least '
            f'{2 if fraction else 1}. stats.json and the table above say where the others went'
        )
    side = np.where(kept, TRAIN, DROPPED).astype(np.uint8)
    side[held_out(kept, corpus.groups / 2.0**64, fraction)] = EVAL
    weights = np.array([source.weight for source in plan.sources])[corpus.sources]
    whole = np.floor(weights)
    extra = corpus.digests[:, 1] / 2.0**64 < weights - whole
    copies = np.where(side == TRAIN, whole + extra, side == EVAL).astype(np.int32)
    return {'state': state, 'side': side, 'copies': copies}
