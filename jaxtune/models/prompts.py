"""Trained tokens before what a model reads, of which the tree holds one of two kinds. They are no part of any output.

- `prompt/embedding [virtual, d_model]`: embedded tokens (prompt tuning; Lester et al. 2021, arXiv:2104.08691);
- `prefix/k` and `prefix/v [virtual, kv_heads, head_dim]` in every attention layer: keys and values of tokens that
  no layer computes (prefix tuning; Li and Liang 2021, arXiv:2101.00190). Keys are not rotated any more.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# The segment of a token that all segments see; itself, as a query, it sees only tokens of its own kind.
SHARED = -1


def without_prompt(params: Any) -> tuple[Any, jax.Array | None]:
    """A tree without its prompt, and the prompt `[virtual tokens, d_model]` or None."""
    if 'prompt' not in params:
        return params, None
    return {name: part for name, part in params.items() if name != 'prompt'}, params['prompt']['embedding']


def prepend(
    prompt: jax.Array, x: jax.Array, positions: jax.Array, segment_ids: jax.Array, segment: int = SHARED
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embedded tokens, positions and segments with the prompt's first.

    A decoder's prompt sees nothing but itself, so that one serves all segments of a packed row (`SHARED`). That of an
    encoder sees the text, and belongs to one segment: rows with a prompt hold no second one.

    Args:
      prompt: `[virtual, d_model]`.
      x: `[batch, length, d_model]`.
      positions: `[batch, length]`, already counted from the end of the prompt.
      segment_ids: `[batch, length]`.
      segment: of the prompt's tokens.

    Returns:
      the same three, `[batch, virtual + length, ...]`.
    """
    batch, count = x.shape[0], prompt.shape[0]
    rows = jnp.broadcast_to(prompt.astype(x.dtype), (batch, *prompt.shape))
    places = jnp.broadcast_to(jnp.arange(count, dtype=positions.dtype), (batch, count))
    marks = jnp.full((batch, count), segment, segment_ids.dtype)
    join = lambda *parts: jnp.concatenate(parts, axis=1)  # noqa: E731
    return join(rows, x), join(places, positions), join(marks, segment_ids)


def prefix_of(attention: nn.Module) -> tuple[jax.Array, jax.Array] | None:
    """The trained keys and values `[virtual, kv_heads, head_dim]` of an attention layer, or None."""
    if not attention.has_variable('params', 'prefix'):
        return None
    prefix = attention.get_variable('params', 'prefix')
    return prefix['k'], prefix['v']


def put_before(prefix: tuple[jax.Array, jax.Array], k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values `[batch, keys, kv_heads, head_dim]` with the prefix's first, `[batch, virtual + keys, ...]`."""
    rows = (jnp.broadcast_to(part.astype(k.dtype), (k.shape[0], *part.shape)) for part in prefix)
    k, v = (jnp.concatenate(parts, axis=1) for parts in zip(rows, (k, v), strict=True))
    return k, v


def places_before(count: int, positions: jax.Array, segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions and segments `[batch, keys]` with those of `count` keys that all segments see first."""
    first = jnp.broadcast_to(jnp.arange(count, dtype=positions.dtype), (positions.shape[0], count))
    return jnp.concatenate([first, positions], 1), jnp.pad(segment_ids, ((0, 0), (count, 0)), constant_values=SHARED)
