"""Prompt tuning's trained tokens, put before what a model reads (Lester et al. 2021, arXiv:2104.08691).

A tree that holds `prompt/embedding [virtual tokens, d_model]` has them; they are no part of any output.
"""

from typing import Any

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
    prompt: jax.Array, x: jax.Array, positions: jax.Array, segments: jax.Array, segment: int = SHARED
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embedded tokens, positions and segments with the prompt's first.

    A decoder's prompt sees nothing but itself, so that one serves all segments of a packed row (`SHARED`).

    Args:
      prompt: `[virtual, d_model]`.
      x: `[batch, length, d_model]`.
      positions: `[batch, length]`, already counted from the end of the prompt.
      segments: `[batch, length]`.
      segment: of the prompt's tokens.

    Returns:
      the same three, `[batch, virtual + length, ...]`.
    """
    batch, count = x.shape[0], prompt.shape[0]
    rows = jnp.broadcast_to(prompt.astype(x.dtype), (batch, *prompt.shape))
    places = jnp.broadcast_to(jnp.arange(count, dtype=positions.dtype), (batch, count))
    marks = jnp.full((batch, count), segment, segments.dtype)
    join = lambda *parts: jnp.concatenate(parts, axis=1)  # noqa: E731
    return join(rows, x), join(places, positions), join(marks, segments)
