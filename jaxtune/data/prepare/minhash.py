"""Near-duplicates: MinHash signatures, locality-sensitive hashing in bands, and a second look at every candidate.

Broder 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3. A signature of many hashes is cut
into bands; documents that agree in one whole band are candidates, and those whose signatures agree in enough places are
near-duplicates. The bands make sure that nothing similar is missed, the second look that nothing else is taken.
"""

import functools

import numpy as np

from jaxtune.data.prepare import words

_SEED = 0x6A617874
_ROWS = 512  # shingles hashed at a time: their table stays in the processor's cache
_PAIRWISE = 16  # up to so many documents of one band are all compared with each other


@functools.cache
def bands(similarity: float, hashes: int) -> tuple[int, int]:
    """`(bands, rows)`: the longest rows that still find 99 % of the pairs at the wanted similarity.

    Args:
      similarity: Jaccard similarity from which on documents are near-duplicates.
      hashes: at most so many in all.
    """
    best = (hashes, 1)
    for rows in range(1, 33):
        count = hashes // rows
        if count and 1 - (1 - similarity**rows) ** count >= 0.99:
            best = (count, rows)
    return best


def threshold(similarity: float, hashes: int) -> float:
    """The share of equal hashes from which on two documents are near-duplicates.

    Two standard deviations below the wanted similarity, so that those just above it are not lost to chance.
    """
    return similarity - 2 * (similarity * (1 - similarity) / hashes) ** 0.5


@functools.cache
def _permutations(hashes: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.Generator(np.random.PCG64(_SEED))
    flips = random.integers(0, 1 << 32, hashes, dtype=np.uint32)
    return flips, random.integers(0, 1 << 31, hashes, dtype=np.uint32) * np.uint32(2) + np.uint32(1)


def signature(hashes_of_words: np.ndarray, ngram: int, hashes: int) -> np.ndarray:
    """MinHash values of a document, uint32 `[hashes]`; all ones where it has no word."""
    shingles = words.shingles(hashes_of_words, ngram)
    values = np.unique((shingles >> np.uint64(32)).astype(np.uint32))
    flips, factors = _permutations(hashes)
    least = np.full(hashes, 0xFFFFFFFF, np.uint32)
    table = np.empty((_ROWS, hashes), np.uint32)
    for start in range(0, len(values), _ROWS):
        part = values[start : start + _ROWS, None]
        rows = table[: len(part)]
        np.bitwise_xor(part, flips, out=rows)
        np.multiply(rows, factors, out=rows)
        np.minimum(least, rows.min(axis=0), out=least)
    return least


def band_hashes(signatures: np.ndarray, count: int, rows: int) -> np.ndarray:
    """One value a band, uint64 `[documents, bands]`, of signatures `[documents, hashes]`."""
    cut = signatures[:, : count * rows].reshape(len(signatures), count, rows).astype(np.uint64)
    mixed = np.zeros(cut.shape[:2], np.uint64)
    for i in range(rows):
        mixed = words.mix(mixed + cut[:, :, i] + np.uint64(0x9E3779B97F4A7C15))
    return mixed


def short(signatures: np.ndarray) -> np.ndarray:
    """The last byte of each value, uint8: what is compared at the second look (b-bit MinHash, Li and König 2010)."""
    return (signatures & np.uint32(0xFF)).astype(np.uint8)


def agreement(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity of short signatures, `[pairs]`."""
    equal = (left == right).mean(axis=-1)
    return (equal - 1 / 256) / (1 - 1 / 256)


def candidates(values: np.ndarray) -> np.ndarray:
    """Pairs of documents with the same value in one band, int64 `[pairs, 2]`, the earlier one first.

    Of a small group every pair; of a large one each with the group's first and with its neighbour, which is enough to
    join them and keeps a thousand copies from becoming a million pairs.
    """
    if not len(values):
        return np.zeros((0, 2), np.int64)
    order = np.argsort(values, kind='stable')
    ordered = values[order]
    edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    sizes = np.diff(edges)
    starts = edges[:-1]
    twins = starts[sizes == 2]
    pairs = [np.stack([order[twins], order[twins + 1]], 1)]
    for start, size in zip(starts[sizes > 2].tolist(), sizes[sizes > 2].tolist(), strict=True):
        group = order[start : start + size]
        if size <= _PAIRWISE:
            left, right = np.triu_indices(size, 1)
            pairs.append(np.stack([group[left], group[right]], 1))
        else:
            pairs.append(np.stack([np.full(size - 1, group[0]), group[1:]], 1))
            pairs.append(np.stack([group[1:-1], group[2:]], 1))
    return np.concatenate(pairs).astype(np.int64)


def clusters(count: int, pairs: np.ndarray) -> np.ndarray:
    """The first document of each document's cluster, int64 `[documents]`: connected components of the pairs."""
    from scipy.sparse import coo_matrix  # of the data extra
    from scipy.sparse.csgraph import connected_components  # of the data extra

    graph = coo_matrix((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, labels = connected_components(graph, directed=False)
    first = np.full(labels.max(initial=-1) + 1, count, np.int64)
    np.minimum.at(first, labels, np.arange(count))
    return first[labels]
