"""What becomes of each document, once all are known: duplicates out, the rest to train on or held out."""

import hashlib
import pathlib

import numpy as np

from jaxtune.data.prepare import minhash, shards
from jaxtune.data.prepare.plan import Plan
from jaxtune.errors import UserError

DROPPED, TRAIN, EVAL = 0, 1, 2
BAND_TASKS = 4  # the bands are looked through by so many tasks
_CHUNK = 1 << 16


def digest(text: str) -> np.ndarray:
    """128 bits of a text whose white space does not count, uint64 `[2]`."""
    data = hashlib.blake2b(' '.join(text.split()).encode('utf-8', 'surrogatepass'), digest_size=16).digest()
    return np.frombuffer(data, '<u8')


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


class Corpus:
    """The indexes of all tasks as one.

    Args:
      work: the folder between the phases.
      tasks: how many there are.
    """

    def __init__(self, work: pathlib.Path, tasks: int):
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
        rows = None
        for task in np.unique(tasks):
            part = np.load(self.work / 'short' / f'{task:05d}.npy', mmap_mode='r')
            if rows is None:
                rows = np.empty((len(documents), part.shape[1]), np.uint8)
            here = tasks == task
            rows[here] = part[documents[here] - self.starts[task]]
        return rows


def edges(corpus: Corpus, plan: Plan, task: int) -> np.ndarray:
    """Pairs of near-duplicates that some of the bands find, int64 `[pairs, 2]`."""
    similarity, hashes = plan.steps['dedup.near'], plan.steps['dedup.hashes']
    count, _ = minhash.bands(similarity, hashes)
    least = minhash.threshold(similarity, hashes)
    firsts = np.flatnonzero(corpus.originals() == np.arange(len(corpus)))
    found = [np.zeros((0, 2), np.int64)]
    for band in range(task, count, BAND_TASKS):
        pairs = firsts[minhash.candidates(corpus.band(band)[firsts])]
        for start in range(0, len(pairs), _CHUNK):
            part = pairs[start : start + _CHUNK]
            alike = minhash.agreement(corpus.short(part[:, 0]), corpus.short(part[:, 1])) >= least
            found.append(part[alike])
    return np.unique(np.concatenate(found), axis=0)


def decide(corpus: Corpus, plan: Plan, pairs: np.ndarray) -> dict[str, np.ndarray]:
    """The fate of every document.

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
    scores = corpus.groups / 2.0**64
    fraction = plan.keys['eval_fraction']
    if kept.sum() < (2 if fraction else 1):
        raise UserError(
            f'data.sources: {kept.sum()} documents are left of {count} that passed the filters; expected at least '
            f'{2 if fraction else 1}. stats.json and the table above say where the others went'
        )
    side = np.where(kept, TRAIN, DROPPED).astype(np.uint8)
    if fraction:
        held_out = kept & (scores < fraction)
        held_out |= kept & (scores == scores[kept].min())  # at least one, with all of its group
        if held_out.sum() == kept.sum():
            held_out &= scores < scores[kept].max()
        side[held_out] = EVAL
    weights = np.array([source.weight for source in plan.sources])[corpus.sources]
    whole = np.floor(weights)
    extra = corpus.digests[:, 1] / 2.0**64 < weights - whole
    copies = np.where(side == TRAIN, whole + extra, side == EVAL).astype(np.int32)
    return {'state': state, 'side': side, 'copies': copies}
