"""Rows that hold a prompt and what follows it, as a model's batch."""

import jax
import jax.numpy as jnp


def inputs(tokens: jax.Array, starts: jax.Array, ends: jax.Array) -> dict[str, jax.Array]:
    """A model's batch of rows whose answers lie between two places.

    Args:
      tokens: `[rows, length]` int32.
      starts: `[rows]` int32, where an answer begins.
      ends: `[rows]` int32, where it ends, and with it the row.

    Returns:
      `tokens`, `positions` and `segment_ids` for `Model.apply`; `targets`, the tokens that come next, and `loss_mask`,
      1 where these belong to the answer; and `ends`.
    """
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    answered = (places + 1 >= starts[:, None]) & (places + 1 < ends[:, None])
    return {
        'tokens': tokens,
        'positions': places,
        'segment_ids': (places < ends[:, None]).astype(jnp.int32),
        'targets': jnp.roll(tokens, -1, axis=1),
        'loss_mask': answered.astype(jnp.float32),
        'ends': ends,
    }
