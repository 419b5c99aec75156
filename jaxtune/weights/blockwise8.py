"""Eight-bit numbers with a dynamic exponent, in blocks that share a scale.

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861: the scales of NF4 and the state
of `adamw8bit` are kept so.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """The 256 values of a code, rising, in `[-1, 1]` or `[0, 1]`: twice as many in each decade, float32."""
    values = []
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        edges = _linspace(count + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        decade = (np.float32(10.0 ** (exponent - 6)) * means).astype(np.float32)
        values += [*decade, *(-decade if signed else ())]
    return np.sort(np.asarray([*values, 0.0, 1.0], np.float32))


def _linspace(count: int) -> np.ndarray:
    """`count` float32 numbers from 0.1 to 1, stepping from both ends to the middle, rounded once each."""
    low, high = float(np.float32(0.1)), 1.0
    step = float(np.float32((high - low) / (count - 1)))
    index = np.arange(count)
    return np.where(index < count // 2, low + step * index, high - step * (count - 1 - index)).astype(np.float32)


def nearest_code(values: jax.Array, signed: bool = True) -> jax.Array:
    """uint8 codes of values in `[-1, 1]` (or `[0, 1]`); of two equally near the lower one."""
    table = dynamic_map(signed)
    lower = jnp.clip(jnp.searchsorted(table, values, side='right').astype(jnp.int32) - 1, 0, 254)
    table = jnp.asarray(table)
    below, above = table[lower], table[lower + 1]
    up = jnp.abs(above - values) < jnp.abs(values - below)
    return (lower + up).astype(jnp.uint8)


@functools.cache
def _steps() -> np.ndarray:
    """The signed code nearest to each of 65,536 evenly spaced values in `[-1, 1]`."""
    table = dynamic_map()
    values = (np.arange(65536) / 32767.5 - 1.0).astype(np.float32)
    lower = np.clip(np.searchsorted(table, values, side='right') - 1, 0, 254)
    return (lower + (np.abs(table[lower + 1] - values) < np.abs(values - table[lower]))).astype(np.uint8)


def stepped_code(values: jax.Array) -> jax.Array:
    """uint8 signed codes of values in `[-1, 1]`, found as bitsandbytes does: on a grid of 65,536 steps.

    Faster than `nearest_code` and as good but for values under 1e-4.
    """
    steps = ((values + 1.0) * 32767.5 + 0.5).astype(jnp.int32)
    return jnp.take(jnp.asarray(_steps()), jnp.clip(steps, 0, 65535), axis=0)


def decode(codes: jax.Array, signed: bool = True) -> jax.Array:
    """float32 values of codes."""
    return jnp.take(jnp.asarray(dynamic_map(signed)), codes.astype(jnp.int32), axis=0)
