"""Eight-bit numbers with a dynamic exponent, in blocks that share a scale.

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861: the scales of NF4 and the state
of `adamw8bit` are kept so.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


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
    """uint8 codes of values in `[-1, 1]` (or `[0, 1]`); of two equally near the lower one.

    On a TPU, where a search costs more than all else of an optimizer, by `formula_code`.
    """
    by_table = functools.partial(_searched, signed=signed)
    return lax.platform_dependent(values, tpu=functools.partial(formula_code, signed=signed), default=by_table)


def nearly(codes: jax.Array, signed: bool = True) -> jax.Array:
    """float32 values of codes; on a TPU by `formula_value`, to the last bit or two."""
    by_table = functools.partial(decode, signed=signed)
    return lax.platform_dependent(codes, tpu=functools.partial(formula_value, signed=signed), default=by_table)


# A positive code counts cells: decade `e` from 1e-6 on has `2**e` of them (twice as many without a sign), each a value
# in its middle; one more code is 1.


def formula_value(codes: jax.Array, signed: bool = True) -> jax.Array:
    """`decode` without a table: the middle of a cell, to a relative error of 1e-6."""
    codes = codes.astype(jnp.int32)
    number = jnp.where(codes > 127, codes - 127, 127 - codes) if signed else codes + 1
    least = 1 if signed else 2
    decade, start = jnp.zeros_like(number), jnp.full_like(number, least)
    scale = jnp.full(number.shape, np.float32(1e-6))
    for e in range(1, 7):
        reached = number >= least << e
        decade = jnp.where(reached, e, decade)
        start = jnp.where(reached, least << e, start)
        scale = jnp.where(reached, np.float32(10.0 ** (e - 6)), scale)
    middle = (number - start).astype(jnp.float32) + 0.5
    value = scale * (0.1 + 0.9 * middle / start.astype(jnp.float32))
    if signed:
        value = jnp.where(codes == 127, 0.0, jnp.where(codes < 127, -value, value))
    else:
        value = jnp.where(codes == 0, 0.0, value)
    return jnp.where(codes == 255, 1.0, value)


def formula_code(values: jax.Array, signed: bool = True) -> jax.Array:
    """`nearest_code` without a search; of two equally near either one."""
    least, size = 1 if signed else 2, jnp.abs(values)
    start, scale = jnp.full(size.shape, np.float32(least)), jnp.full(size.shape, np.float32(1e6))
    for e in range(1, 7):  # half way between the last middle of a decade and the first of the next
        reached = size > np.float32(10.0 ** (e - 7) * (1 + 0.9 / (least << (e - 1))))
        start = jnp.where(reached, np.float32(least << e), start)
        scale = jnp.where(reached, np.float32(10.0 ** (6 - e)), scale)
    cell = jnp.floor((size * scale - 0.1) * start * np.float32(1 / 0.9))
    number = (start + jnp.clip(cell, 0, start - 1)).astype(jnp.int32)
    top = np.float32(1 - 0.225 / (least << 6))
    number = jnp.where(size < np.float32(1e-6 * (0.1 + 0.45 / least) / 2), least - 1, number)
    if not signed:
        return jnp.where(size > top, 255, number - 1).astype(jnp.uint8)
    code = jnp.where(values < 0, 127 - number, 127 + number)
    return jnp.where(values > top, 255, code).astype(jnp.uint8)


def _searched(values: jax.Array, signed: bool) -> jax.Array:
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
