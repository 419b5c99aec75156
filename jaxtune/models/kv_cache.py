"""Keys and values of the tokens read so far, and attention of the one token that is read next.

A head's slots lie together, `[layers, batch, kv_heads, slots, head_dim]`: the products of one token with them read the
cache as it lies. With the heads inside of the slots, every token would lay out all of its layer's keys and values anew.

Prompts are read by a scan over the layers. The tokens after them are read layer by layer (`divided`, `each_layer`): a
scan cuts each layer's weights, keys and values out before it uses them, and copying them takes as long as all that a
single token does with them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxtune.models.attention import MASK_VALUE, visible_softmax

# `k`, `v` and others: an array for all layers, or, divided, a tuple of one `[1, batch, ...]` a layer; and what is none
# of a layer's, `[batch, ...]`.
Cache = dict[str, Any]

OF_ALL_LAYERS = ('source_segment_ids',)


def empty(layers: int, batch: int, kv_heads: int, slots: int, head_dim: int, dtype: jnp.dtype) -> Cache:
    """A cache of nothing: `k` and `v`."""
    room = jnp.zeros((layers, batch, kv_heads, slots, head_dim), dtype)
    return {'k': room, 'v': room}


def slots(cache: Cache) -> int:
    """How many tokens a row has room for."""
    return jax.tree.leaves(cache['k'])[0].shape[3]


def divided(cache: Cache, room: int) -> Cache:
    """The cache layer by layer, its `k` and `v` with room for so many tokens more."""

    def cut(name: str, x: jax.Array) -> Any:
        if name in OF_ALL_LAYERS:
            return x
        more = ((0, 0), (0, 0), (0, 0), (0, room if name in ('k', 'v') else 0), (0, 0))
        return tuple(jnp.pad(x[i : i + 1], more) for i in range(len(x)))

    return {name: cut(name, x) for name, x in cache.items()}


def is_divided(cache: Cache) -> bool:
    """Whether it is what `divided` gives."""
    return isinstance(cache['k'], tuple)


def by_rows(function: Callable[[jax.Array, int], jax.Array], cache: Cache) -> Cache:
    """The cache with a function of every array, and of which of its dimensions is the batch."""
    return {
        name: jax.tree.map(lambda x, axis=int(name not in OF_ALL_LAYERS): function(x, axis), part)
        for name, part in cache.items()
    }


def each_layer(
    layer: Callable[[int, tuple[jax.Array, Cache]], tuple[jax.Array, Cache]], x: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """What a scan over layers gives, for a divided cache.

    Args:
      layer: of a layer's number and `(x, cache)`, of which its part of the cache is number 0 of one; returns the same.
      x: what the first layer gets.
      cache: of all layers.
    """
    parts = {name: part for name, part in cache.items() if name not in OF_ALL_LAYERS}
    new = []
    for i in range(len(cache['k'])):
        x, part = layer(i, (x, {name: part[i] for name, part in parts.items()}))
        new.append(part)
    return x, {**cache, **{name: tuple(part[name] for part in new) for name in parts}}


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
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention of one token a row, with grouped queries; the softmax in float32.

    Args:
      q: `[batch, 1, heads, head_dim]`; `heads` is a multiple of `kv_heads`.
      k: a layer's keys `[batch, kv_heads, slots, head_dim]`.
      v: its values, like `k`.
      visible: bool `[batch, slots]`. A token that sees nothing gets 0.
      scale: factor on the scores.
      softcap: scores become `softcap * tanh(scores / softcap)`; None = off.
      bias: float32 `[batch or 1, heads, slots]`, added to the scores, or None.
      sinks: float32 `[heads]`, a score of each head that takes part in its softmax and adds nothing, or None.

    Returns:
      `[batch, 1, heads, head_dim]` in the dtype of `q`.
    """
    chex.assert_shape(q, (k.shape[0], 1, None, k.shape[3]), custom_message='q')
    chex.assert_shape(v, k.shape, custom_message='v')
    chex.assert_shape(visible, (k.shape[0], k.shape[2]), custom_message='visible')
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[-1])
    scores = jnp.einsum('bhgd,bhsd->bhgs', grouped, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.reshape(bias.shape[0], *grouped.shape[1:3], -1)
    weights = visible_softmax(scores, visible[:, None, None])
    if sinks is not None:
        total = jax.nn.logsumexp(jnp.where(visible[:, None, None], scores, MASK_VALUE), axis=-1, keepdims=True)
        weights = weights * jax.nn.sigmoid(total - sinks.reshape(k.shape[1], -1, 1))
    return jnp.einsum('bhgs,bhsd->bhgd', weights.astype(v.dtype), v).reshape(q.shape)
