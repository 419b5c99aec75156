"""Held-out loss by the position of the predicted token: sums that a loss gives where its batch asks for them.

An evaluation puts `EDGES` into the batch; a loss that finds them there adds `SUMS` to its sums.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

EDGES = 'position_edges'  # `[buckets]` int32: the first position of each bucket, ascending from 0
SUMS = 'by_position'  # summed losses and their counts, each `[buckets]`


def bounds(buckets: int, length: int) -> np.ndarray | None:
    """First positions of buckets as wide as each other (to a token) in rows of a length, and that length; None of 0."""
    return np.arange(buckets + 1, dtype=np.int64) * length // buckets if buckets else None


def sums(batch: Mapping[str, jax.Array], logprobs: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Sums of the losses by bucket, and the weights that they count; {} where the batch does not ask for them.

    Args:
      batch: rows whose tokens predict the next one.
      logprobs: `[batch, length]` float32, of the targets; any finite number where `loss_mask` is 0.
    """
    if EDGES not in batch:
        return {}
    edges, weights = batch[EDGES], batch['loss_mask']
    bucket = jnp.searchsorted(edges, batch['positions'] + 1, side='right') - 1

    def of_row(bucket: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.zeros(edges.shape, jnp.float32).at[bucket].add(values)

    # Each row first: no device needs another's tokens, and short sums round less.
    total, count = (jax.vmap(of_row)(bucket, values).sum(0) for values in (-weights * logprobs, weights))
    if jax.sharding.get_abstract_mesh().empty:
        return {SUMS: (total, count)}
    # Every host reads them.
    return {SUMS: jax.lax.with_sharding_constraint((total, count), P())}


def metrics(bounds: np.ndarray, totals: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """`loss_by_position/LOW-HIGH` and `tokens_by_position/LOW-HIGH`, both ends included; no loss of no tokens."""
    found = {}
    for low, end, total, count in zip(bounds[:-1], bounds[1:], *totals, strict=True):
        if count:
            found[f'loss_by_position/{low}-{end - 1}'] = float(total / count)
        found[f'tokens_by_position/{low}-{end - 1}'] = int(count)
    return found
