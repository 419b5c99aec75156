"""The two things a model ever does with a kernel: multiply by it and look rows up in it."""

import jax
import jax.numpy as jnp


def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies activations `[..., in]` by a kernel `[in, out]` in the dtype of `x`; returns `[..., out]`."""
    return jnp.dot(x, kernel.astype(x.dtype))


def lookup(embedding: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of an embedding `[vocab, d_model]` for integer `ids` of any shape; returns `[*ids.shape, d_model]`."""
    return jnp.take(embedding, ids, axis=0).astype(dtype)
