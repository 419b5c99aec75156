"""What encoder-decoder objectives share: the shape of a row, and the targets that the decoder reads shifted."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.models import Model


def make_row(seq_len: int, target_len: int) -> dict[str, jax.ShapeDtypeStruct]:
    """`tokens`, `segment_ids` `[seq_len]`: the source; `targets`, `target_segment_ids` `[target_len]`: what is written.

    A target sees the source of its own segment; 0 is padding.
    """
    source, target = jax.ShapeDtypeStruct((seq_len,), np.int32), jax.ShapeDtypeStruct((target_len,), np.int32)
    return {'tokens': source, 'segment_ids': source, 'targets': target, 'target_segment_ids': target}


def fill_row(pairs: Iterable[tuple[np.ndarray, np.ndarray]], seq_len: int, target_len: int) -> dict[str, np.ndarray]:
    """Sources and their targets as a row, each pair a segment, padded right."""
    row = {name: np.zeros(field.shape, field.dtype) for name, field in make_row(seq_len, target_len).items()}
    at = {'tokens': 0, 'targets': 0}
    for number, pair in enumerate(pairs, 1):
        for (name, segment_ids), part in zip(_PARTS, pair, strict=True):
            low, high = at[name], at[name] + len(part)
            row[name][low:high] = part
            row[segment_ids][low:high] = number
            at[name] = high
    return row


_PARTS = (('tokens', 'segment_ids'), ('targets', 'target_segment_ids'))


def pair_sizes(sources: np.ndarray, targets: np.ndarray, seq_len: int, target_len: int) -> np.ndarray:
    """How much of a row's `seq_len` each pair takes, so that pairs which fit by it fit on both sides.

    Args:
      sources: `[pairs]` lengths, at most `seq_len`.
      targets: `[pairs]` lengths, at most `target_len`.
      seq_len: places of a row's source.
      target_len: places of a row's target.
    """
    return np.maximum(sources, -(-targets * seq_len // target_len))


def decode(
    model: Model,
    params: Any,
    batch: Mapping[str, jax.Array],
    rng: jax.Array | None,
    name_ids: Callable[[jax.Array], jax.Array] = lambda ids: ids,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The decoder's states before each target, the targets, and which of them are scored.

    Args:
      model: an encoder-decoder; its decoder begins with the family's start token, then reads the targets one late.
      params: its parameters.
      batch: rows of `make_row`.
      rng: for dropout of added weights.
      name_ids: turns the ids of rows into the model's.

    Returns:
      `(hidden [batch, target_len, d_model], targets [batch, target_len], weights [batch, target_len])`.
    """
    targets, segment_ids = name_ids(batch['targets']), batch['target_segment_ids']
    first = segment_ids != jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    inputs = {
        'tokens': name_ids(batch['tokens']),
        'segment_ids': batch['segment_ids'],
        'decoder_tokens': jnp.where(first, model.config.start_id, shifted),
        'decoder_segment_ids': segment_ids,
    }
    outputs = model.apply(params, inputs, rng=rng)
    weights = (segment_ids > 0).astype(jnp.float32)
    return outputs.hidden, targets, weights
