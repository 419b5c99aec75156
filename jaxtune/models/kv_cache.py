"""Keys and values of the tokens read so far, and attention of the one token that is read next.

A head's slots lie together, `[layers, batch, kv_heads, slots, head_dim]`: the products of one token with them read the
cache as it lies. With the heads inside of the slots, every token would lay out all of its layer's keys and values anew.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Cache = dict[str, jax.Array]

_HIDDEN = -1e30  # the score of a slot that may not be seen


def empty(layers: int, batch: int, kv_heads: int, slots: int, head_dim: int, dtype: jnp.dtype) -> Cache:
    """A cache of nothing: `k` and `v`."""
    room = jnp.zeros((layers, batch, kv_heads, slots, head_dim), dtype)
    return {'k': room, 'v': room}


def slots(cache: Cache) -> int:
    """How many tokens a row has room for."""
    return cache['k'].shape[3]


def write(cache: Cache, layer: jax.Array, values: Mapping[str, jax.Array], at: jax.Array) -> Cache:
    """Puts a layer's keys and values `[batch, length, kv_heads, head_dim]` into slots `[batch, length]`.

    A slot beyond the last one takes nothing.
    """
    rows = jnp.arange(at.shape[0])[:, None]
    new = {
        name: cache[name].at[layer, rows, :, at].set(value.astype(cache[name].dtype), mode='drop')
        for name, value in values.items()
    }
    return {**cache, **new}


def attend_one(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Attention of one token a row, with grouped queries; the softmax in float32.

    Args:
      q: `[batch, 1, heads, head_dim]`; `heads` is a multiple of `kv_heads`.
      k: a layer's keys `[batch, kv_heads, slots, head_dim]`; `v` likewise.
      visible: bool `[batch, slots]`. A token that sees nothing gets 0.
      scale: factor on the scores.
      softcap: scores become `softcap * tanh(scores / softcap)`; None = off.
      bias: float32 `[batch or 1, heads, slots]`, added to the scores, or None.

    Returns:
      `[batch, 1, heads, head_dim]` in the dtype of `q`.
    """
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[-1])
    scores = jnp.einsum('bhgd,bhsd->bhgs', grouped, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], *grouped.shape[1:3], -1)
    visible = visible[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, _HIDDEN), axis=-1) * visible
    return jnp.einsum('bhgs,bhsd->bhgd', weights.astype(v.dtype), v).reshape(q.shape)
