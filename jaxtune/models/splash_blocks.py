"""Sizes of the blocks of queries and keys that splash attention works on, by a model of its time on a TPU.

A step of a kernel's grid costs about a third of a microsecond whatever its block holds, so blocks should be large; a
block on the diagonal of a causal mask is computed whole, though, so they should be small beside the row. All is counted
in the time that the forward pass takes for one pair of a query and a key. The constants are for a v5e's ratio of
products to steps and to memory; of a faster chip they are larger, and the choice is the same or nearly as good.
"""

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

SMALLEST = 128
_SIZES = (128, 256, 512, 1024, 2048)
_COMPUTED = 512  # keys of a block that are multiplied at a time
_ROW = 256  # bytes of a query: 128 wide in bfloat16, what the constants are for
_STEP = 2**17  # pairs that take as long as a step of the grid
_PARTIAL = 576  # pairs that take as long as writing one query's partial gradient and, by libtpu, adding it up
# What libtpu fits into the 16 MiB of a kernel's scoped VMEM: pairs of a block, and bytes of its queries or keys.
_MOST_PAIRS = 2**21
_MOST_BYTES = 2**19
# The fused backward kernel writes a gradient of the queries for each block of keys: at most so many times them.
_MOST_PARTIALS = 4


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries and keys of a block.

    Attributes:
      forward: of the forward kernel.
      keys: of the kernel of the keys' gradients.
      queries: of the kernel of the queries' gradients; None where the one before makes them too.
    """

    forward: tuple[int, int]
    keys: tuple[int, int]
    queries: tuple[int, int] | None

    @property
    def sizes(self) -> dict[str, Any]:
        """The library's arguments."""
        (q, kv), (q_dkv, kv_dkv), (q_dq, kv_dq) = self.forward, self.keys, self.queries or (None, None)
        return {
            'block_q': q,
            'block_kv': kv,
            'block_kv_compute': min(kv, _COMPUTED),
            'block_q_dkv': q_dkv,
            'block_kv_dkv': kv_dkv,
            'block_kv_dkv_compute': min(kv_dkv, _COMPUTED),
            'block_q_dq': q_dq,
            'block_kv_dq': kv_dq,
            'use_fused_bwd_kernel': self.queries is None,
        }


@functools.cache
def choose(length: int, shards: int, row_bytes: int, window: int | None, causal: bool) -> Blocks:
    """The sizes that take least time by the model.

    Args:
      length: tokens of a row; each shard's part is a multiple of `SMALLEST`.
      shards: devices that a row's queries are divided over.
      row_bytes: of one query.
      window: sliding window in tokens, or None.
      causal: keys after the query are hidden.
    """
    step = _STEP * _ROW / row_bytes
    fitting = [
        (q, kv)
        for q, kv in itertools.product(_SIZES, _SIZES)
        if (length // shards) % q == 0
        and length % kv == 0
        and q * kv <= _MOST_PAIRS
        and (max(q, kv) * row_bytes <= _MOST_BYTES or q == kv == SMALLEST)
    ]

    def seconds(block: tuple[int, int], products: float, whole: bool = False) -> float:
        """Of a kernel with `products` for the forward pass's two; `whole`: its grid holds the hidden blocks too."""
        seen, every = _visited(length, block, window, causal)
        return seen * products / 2 * block[0] * block[1] + (every if whole else seen) * step

    def fused(block: tuple[int, int]) -> float:
        return seconds(block, 5, whole=True) + length // block[1] * length * _PARTIAL

    forward = min(fitting, key=lambda block: seconds(block, 2))
    keys = min(fitting, key=lambda block: seconds(block, 4))
    queries = min(fitting, key=lambda block: seconds(block, 3))
    both = [block for block in fitting if length // block[1] <= _MOST_PARTIALS]
    best = min(both, key=fused, default=None)
    if best is not None and fused(best) < seconds(keys, 4) + seconds(queries, 3):
        return Blocks(forward, best, None)
    return Blocks(forward, keys, queries)


def _visited(length: int, block: tuple[int, int], window: int | None, causal: bool) -> tuple[int, int]:
    """How many blocks hold a pair that may see each other, and how many there are."""
    size, keys = block
    first = np.arange(0, length, size)
    high = np.minimum(first + size, length) if causal else np.full_like(first, length)
    low = np.zeros_like(first) if window is None else np.maximum(first - window + 1, 0)
    return int((-(-high // keys) - low // keys).sum()), len(first) * (length // keys)
