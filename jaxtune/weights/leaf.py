"""The two things a model ever does with a kernel: multiply by it and look rows up in it."""

import jax
import jax.numpy as jnp
from jax import lax


def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies activations `[..., in]` by a kernel `[in, out]` in the dtype of `x`; returns `[..., out]`."""
    return _dot(x, kernel.astype(x.dtype))


@jax.custom_vjp
def _dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.dot(x, kernel)


def _dot_forward(x, kernel):
    return jnp.dot(x, kernel), (x, kernel)


def _dot_backward(residuals, d_y):
    """The usual products; of the two ways to write the kernel's gradient, the one that transposes the narrower factor.

    XLA:CPU writes the factor on the left anew, transposed, with all the arithmetic that made it fused into strided
    writes; JAX's own rule always puts the output's gradient there, four times as wide in a feed-forward layer.
    """
    x, kernel = residuals
    d_x = lax.dot_general(d_y, kernel, (((d_y.ndim - 1,), (1,)), ((), ())))
    rows = tuple(range(x.ndim - 1))
    if kernel.shape[0] <= kernel.shape[1]:
        d_kernel = lax.dot_general(x, d_y, ((rows, rows), ((), ())))
    else:
        d_kernel = lax.dot_general(d_y, x, ((rows, rows), ((), ()))).T
    return d_x, d_kernel


_dot.defvjp(_dot_forward, _dot_backward)


def lookup(embedding: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of an embedding `[vocab, d_model]` for integer `ids` of any shape; returns `[*ids.shape, d_model]`."""
    return jnp.take(embedding, ids, axis=0).astype(dtype)
