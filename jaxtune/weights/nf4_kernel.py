"""The product of few tokens with an NF4 weight in one kernel: codes are read once, no wide weight is written.

XLA widens the weight first, which it writes and reads again, or, where it fuses the two on a TPU, finds each value by
15 comparisons. With few tokens that is most of the time: reading half a byte of codes, writing two and reading two
takes as long as the product itself of 500 tokens on an H200, of 600 on a TPU v5e. At `FEW` tokens XLA's path thus takes
three times as long as the product alone; beyond, the kernel's own product, which is slower than XLA's, would soon eat
up what it saves. By libtpu's own schedules, for 4,096 x 4,096 weights in blocks of 64 on a v5e, in
microseconds:

| tokens | 8 | 128 | 256 | 512 |
|---|---|---|---|---|
| XLA | 184 | 189 | 195 | 206 |
| kernel | 68 | 73 | 98 | 142 |

In a scan over layers, whose slices are copied for the kernel, 8 tokens move 1.7 bytes a weight on an H100 where XLA's
path moves 6.7, and 4.0 on a v5e where it moves 19.1 (`jaxtune.cost`); that is 23 for 53 and 173 for 255 microseconds.

On a TPU both codes of a byte are looked up within a register (Mosaic's gather along lanes), and so is each weight's
scale. The order in which XLA would interleave the two halves of the bytes costs much there: the inputs are put into
the order of the codes instead. On a GPU it is Pallas' Triton kernel, as one source then serves Ada (RTX 4090), Hopper
and Blackwell: Mosaic-GPU's matrix instructions differ between them, and Ada has none of Hopper's. Values are looked up
in 64 bytes that the first-level cache holds.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtune.parallel import auto_axes, axis_size, platform

FEW = 256  # tokens up to which the kernel runs
PLATFORMS = ('tpu', 'gpu', 'cuda')

_BYTES = 128  # of codes that are worked on at a time: a TPU register's lanes
_ROWS, _COLUMNS = 256, 2048  # outputs and inputs of a TPU's tile
_GPU_ROWS = 32  # outputs of a GPU's block, few, so that the grid keeps every multiprocessor busy
_GPU_TOKEN_BYTES = 128  # of a block's tokens at one input: what the shared memory of Ada (99 KiB) has room for


def available(tokens: int, matrix: tuple[int, int], block: int) -> tuple[bool, str]:
    """Whether the kernel runs here, and why not where it would be wanted.

    Args:
      tokens: how many are multiplied.
      matrix: `(in, out)`.
      block: weights that share a scale.
    """
    inputs, outputs = matrix
    if platform() not in PLATFORMS or tokens > FEW:
        return False, ''
    if auto_axes():
        return False, f'the fused kernel runs on one device, and the mesh has {axis_size(*auto_axes())}'
    if block & (block - 1) or block > 2 * _BYTES:
        return False, f'the fused kernel needs blocks of a power of two up to {2 * _BYTES}, not {block}'
    rows = 128 if platform() == 'tpu' else _GPU_ROWS
    if inputs % (2 * _BYTES) or outputs % rows:
        return False, f'the fused kernel needs inputs in {2 * _BYTES}s and outputs in {rows}s, not {inputs} x {outputs}'
    return True, ''


def fused_dot(x: jax.Array, codes: jax.Array, scales: jax.Array, table: np.ndarray, interpret: str = '') -> jax.Array:
    """`[tokens, in] -> [tokens, out]` in the dtype of `x`; sums in float32.

    Args:
      x: the activations.
      codes: uint8 `[out, in / 2]`, the earlier weight in the high half.
      scales: float32 `[out, blocks]`.
      table: float32 `[16]`, the values of the codes.
      interpret: `tpu` or `gpu`: that platform's kernel, in Pallas' interpreter.
    """
    kernel = _tpu if (interpret or platform()) == 'tpu' else _gpu
    return kernel(x, codes, scales, table, bool(interpret))


def by_halves(x: jax.Array) -> jax.Array:
    """`[tokens, in]` in the order in which a TPU's kernel adds up: of each 256 inputs the even ones, then the odd."""
    tokens, inputs = x.shape
    return x.reshape(tokens, inputs // (2 * _BYTES), _BYTES, 2).swapaxes(-1, -2).reshape(tokens, inputs)


def _padded(x: jax.Array, *multiples: int) -> jax.Array:
    """`x` with zeros up to multiples in each dimension."""
    return jnp.pad(x, [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)])


def _tpu(x: jax.Array, codes: jax.Array, scales: jax.Array, table: np.ndarray, interpret: bool) -> jax.Array:
    """Tiles of outputs by inputs; the product is `weight @ x.T`, which holds tokens still and streams the weight."""
    from jax.experimental import pallas as pl  # slow to import
    from jax.experimental.pallas import tpu as pltpu  # slow to import

    (tokens, inputs), outputs = x.shape, codes.shape[0]
    block = inputs // scales.shape[1]
    rows, columns = min(_ROWS, outputs), min(_COLUMNS, inputs)
    # What a last tile reads of codes beyond the end is multiplied by zeros of both.
    x = _padded(by_halves(x), 8, columns)
    scales = _padded(scales.T, columns // block, rows).reshape(-1, columns // block, outputs + -outputs % rows)
    y = pl.pallas_call(
        functools.partial(_tpu_tile, table=table, block=block),
        out_shape=jax.ShapeDtypeStruct((outputs, len(x)), jnp.float32),
        grid=(pl.cdiv(outputs, rows), x.shape[1] // columns),
        in_specs=[
            pl.BlockSpec((rows, columns // 2), lambda i, j: (i, j)),
            pl.BlockSpec((None, columns // block, rows), lambda i, j: (j, 0, i)),
            pl.BlockSpec((len(x), columns), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((rows, len(x)), lambda i, j: (i, 0)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
        interpret=interpret,
        name='nf4_dot',
    )(codes, scales, x)
    return y.T[:tokens].astype(x.dtype)


def _tpu_tile(codes_ref: Any, scales_ref: Any, x_ref: Any, y_ref: Any, *, table: np.ndarray, block: int) -> None:
    from jax.experimental import pallas as pl  # slow to import

    rows, half = codes_ref.shape
    lane = lax.broadcasted_iota(jnp.int32, (rows, _BYTES), 1)
    values = jnp.zeros((rows, _BYTES), jnp.float32)
    for code, value in enumerate(table):
        values = jnp.where(lane == code, value, values)
    scales = scales_ref[...].T
    if scales.shape[1] < _BYTES:
        scales = jnp.concatenate([scales, jnp.zeros((rows, _BYTES - scales.shape[1]), jnp.float32)], axis=1)
    wide = []
    for first in range(0, half, _BYTES):
        codes = codes_ref[:, first : first + _BYTES].astype(jnp.int32)
        own = _looked_up(scales, 2 * first // block + lane // (block // 2))
        wide += [(_looked_up(values, code) * own).astype(x_ref.dtype) for code in (codes >> 4, codes & 15)]
    dims = (((1,), (1,)), ((), ()))
    y = lax.dot_general(jnp.concatenate(wide, axis=1), x_ref[...], dims, preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        y_ref[...] = y

    @pl.when(pl.program_id(1) > 0)
    def _() -> None:
        y_ref[...] += y


def _looked_up(table: jax.Array, lanes: jax.Array) -> jax.Array:
    """Of each row the entries at these places, `[rows, 128]`."""
    return jnp.take_along_axis(table, lanes, axis=1, mode='promise_in_bounds')


def _gpu(x: jax.Array, codes: jax.Array, scales: jax.Array, table: np.ndarray, interpret: bool) -> jax.Array:
    """Blocks of tokens by outputs, each over all inputs."""
    from jax.experimental import pallas as pl  # slow to import
    from jax.experimental.pallas import triton  # slow to import

    (tokens, inputs), outputs = x.shape, codes.shape[0]
    block = inputs // scales.shape[1]
    # Triton multiplies no fewer than 16.
    count = min(_GPU_TOKEN_BYTES // x.dtype.itemsize, max(16, 1 << (tokens - 1).bit_length()))
    x = _padded(x, count, 1)
    pairs = x.reshape(len(x), inputs // 2, 2)
    y = pl.pallas_call(
        functools.partial(_gpu_block, block=block),
        out_shape=jax.ShapeDtypeStruct((len(x), outputs), x.dtype),
        grid=(outputs // _GPU_ROWS, len(x) // count),
        in_specs=[
            pl.BlockSpec((_GPU_ROWS, inputs // 2), lambda i, j: (i, 0)),
            pl.BlockSpec((_GPU_ROWS, inputs // block), lambda i, j: (i, 0)),
            pl.BlockSpec((count, inputs // 2), lambda i, j: (j, 0)),
            pl.BlockSpec((count, inputs // 2), lambda i, j: (j, 0)),
            pl.BlockSpec((len(table),), lambda i, j: (0,)),
        ],
        out_specs=pl.BlockSpec((count, _GPU_ROWS), lambda i, j: (j, i)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name='nf4_dot',
    )(codes, scales, pairs[..., 0], pairs[..., 1], jnp.asarray(table))
    return y[:tokens]


def _gpu_block(
    codes_ref: Any, scales_ref: Any, even_ref: Any, odd_ref: Any, table_ref: Any, y_ref: Any, *, block: int
) -> None:
    from jax.experimental import pallas as pl  # slow to import

    rows, half = codes_ref.shape
    shared = 2 * _BYTES // block  # scales of the bytes at a time

    def add(i: jax.Array, y: jax.Array) -> jax.Array:
        part = pl.ds(i * _BYTES, _BYTES)
        codes = codes_ref[:, part].astype(jnp.int32)
        scales = scales_ref[:, pl.ds(i * shared, shared)]
        scales = jnp.broadcast_to(scales[:, :, None], (rows, shared, block // 2)).reshape(rows, _BYTES)
        for code, x_ref in ((codes >> 4, even_ref), (codes & 15, odd_ref)):
            wide = (table_ref[code] * scales).astype(x_ref.dtype)
            y += lax.dot_general(x_ref[:, part], wide, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return y

    y = lax.fori_loop(0, half // _BYTES, add, jnp.zeros(y_ref.shape, jnp.float32))
    y_ref[...] = y.astype(y_ref.dtype)
