"""The product of rows that lie sorted by group with a kernel of each group: what a mixture of experts multiplies by.

No work is done for experts that a row did not choose, and no array of rows by experts is made. What runs where:

- TPU: megablox (Gale et al. 2022, arXiv:2211.15841), the Pallas kernels that come with JAX.
- elsewhere: blocks of rows, each of one group. `jax.lax.ragged_dot` multiplies every row by every kernel there.
"""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.parallel import platform
from jaxtune.weights.leaf import Weight

_TILES = (512, 1024, 1024)  # of rows, inputs and outputs, that megablox works on
_CHUNK = 16  # blocks that a GPU multiplies at a time, each by a copy of its kernel
_SMALL = 2**28  # bytes of all blocks' copies, or gradients, up to which a GPU multiplies all of them at once


@functools.partial(jax.tree_util.register_dataclass, data_fields=['sizes'], meta_fields=['rows', 'block', 'name'])
@dataclasses.dataclass(frozen=True)
class Groups:
    """How rows are divided among groups, one group after the other from the first row on.

    Attributes:
      sizes: int32 `[groups]`, rows of each group: multiples of `block`, filled up with rows of zeros.
      rows: how many there are, of which the last may belong to no group.
      block: see `sizes`.
      name: of the product: `megablox` or `blocks`.
    """

    sizes: jax.Array
    rows: int
    block: int
    name: str

    @property
    def words(self) -> str:
        """Which product runs, for the log."""
        return self.name if self.block == 1 else f'{self.name} of {self.block} rows'

    def of_rows(self) -> jax.Array:
        """The group of each row, int32 `[rows]`; rows of no group count as the last group's."""
        ends = jnp.cumsum(self.sizes)
        of = jnp.searchsorted(ends, jnp.arange(self.rows, dtype=ends.dtype), side='right')
        return jnp.minimum(of, len(self.sizes) - 1)


def choose(rows: int, groups: int) -> tuple[str, int, int]:
    """`(name, block, room)`: the product for this platform, and what `Groups` are to have for it.

    Args:
      rows: how many there are at most, before groups are filled up.
      groups: among which they are divided.
    """
    if platform() == 'tpu':
        return 'megablox', 1, -(-rows // _tile(rows)) * _tile(rows)
    largest = 128 if platform() == 'cpu' else 256
    block = 8
    while block < largest and 2 * block * groups <= rows:
        block *= 2
    multiple = block if platform() == 'cpu' else block * _CHUNK
    return 'blocks', block, -(-(rows + min(rows, groups) * (block - 1)) // multiple) * multiple


def grouped_dot(x: jax.Array, kernel: jax.Array | Weight, groups: Groups, rng: jax.Array | None = None) -> jax.Array:
    """Multiplies each row by its group's kernel, in the dtype of `x`.

    Args:
      x: `[rows, in]`.
      kernel: `[groups, in, out]`, an array or a typed leaf.
      groups: which rows are whose.
      rng: key for dropout in the leaf, or None.

    Returns:
      `[rows, out]`; rows of no group hold nothing that means anything.
    """
    chex.assert_shape(x, (groups.rows, kernel.shape[-2]), custom_message='x: [rows, in]')
    chex.assert_equal(kernel.shape[0], len(groups.sizes), custom_message='kernel: [groups, in, out]')
    if isinstance(kernel, Weight):
        return kernel.grouped_dot(x, groups, rng)
    return _dot(groups.name, groups.block, x, kernel.astype(x.dtype), groups.sizes)


def product(x: jax.Array, kernel: jax.Array, groups: Groups, transposed: bool = False) -> jax.Array:
    """`grouped_dot` of an array, not differentiable; `transposed`: the kernel is `[groups, out, in]`."""
    return _PRODUCTS[groups.name](x, kernel, groups.sizes, groups.block, transposed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dot(name: str, block: int, x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    return _PRODUCTS[name](x, kernel, sizes, block, False)


def _dot_forward(name: str, block: int, x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> tuple[jax.Array, tuple]:
    return _dot(name, block, x, kernel, sizes), (x, kernel, sizes)


def _dot_backward(name: str, block: int, residuals: tuple, d_y: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, kernel, sizes = residuals
    d_x = _PRODUCTS[name](d_y, kernel, sizes, block, True)
    return d_x, _GRADIENTS[name](x, d_y, sizes, block).astype(kernel.dtype), None


_dot.defvjp(_dot_forward, _dot_backward)


def _tile(rows: int) -> int:
    return min(_TILES[0], max(128, 1 << (rows - 1).bit_length()))


def _tiling(rows: int, inputs: int, outputs: int) -> tuple[int, int, int]:
    return _tile(rows), min(_TILES[1], -(-inputs // 128) * 128), min(_TILES[2], -(-outputs // 128) * 128)


def _megablox(x: jax.Array, kernel: jax.Array, sizes: jax.Array, block: int, transposed: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # slow to import

    inputs, outputs = kernel.shape[1:][::-1] if transposed else kernel.shape[1:]
    tiling = _tiling(len(x), inputs, outputs)
    return gmm(x, kernel, _with_rest(sizes, len(x)), x.dtype, tiling, transpose_rhs=transposed)


def _megablox_gradient(x: jax.Array, d_y: jax.Array, sizes: jax.Array, block: int) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # slow to import

    tiling = _tiling(len(x), x.shape[1], d_y.shape[1])
    return tgmm(x.T, d_y, _with_rest(sizes, len(x)), jnp.float32, tiling, num_actual_groups=len(sizes))


def _with_rest(sizes: jax.Array, rows: int) -> jax.Array:
    """Sizes with that of one more group, of the rows that belong to none: the kernels skip it, and give zeros there.

    Where experts are divided over devices, those are most rows: each device has room for all tokens.
    """
    return jnp.append(sizes, rows - sizes.sum())


def _group_of_blocks(sizes: jax.Array, block: int, count: int) -> tuple[jax.Array, jax.Array]:
    """`(of, used)`: the group of each of `count` blocks, and how many belong to one."""
    ends = jnp.cumsum(sizes) // block
    of = jnp.searchsorted(ends, jnp.arange(count, dtype=ends.dtype), side='right')
    return jnp.minimum(of, len(sizes) - 1), ends[-1]


def _blocks(x: jax.Array, kernel: jax.Array, sizes: jax.Array, block: int, transposed: bool) -> jax.Array:
    count, contracted = len(x) // block, 2 if transposed else 1
    of, used = _group_of_blocks(sizes, block, count)
    if platform() != 'cpu':
        copies = count * kernel.shape[1] * kernel.shape[2] * kernel.dtype.itemsize
        chunk = count if copies <= _SMALL else _CHUNK

        def some(part: tuple[jax.Array, jax.Array]) -> jax.Array:
            rows, of = part
            return lax.dot_general(rows, jnp.take(kernel, of, axis=0), (((2,), (contracted,)), ((0,), (0,))))

        y = lax.map(some, (x.reshape(-1, chunk, block, x.shape[1]), of.reshape(-1, chunk)))
        return y.reshape(len(x), -1)

    def put(i: jax.Array, y: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(x, i * block, block)
        own = lax.dynamic_index_in_dim(kernel, of[i], keepdims=False)
        part = lax.dot_general(rows, own, (((1,), (contracted - 1,)), ((), ())))
        return lax.dynamic_update_slice_in_dim(y, part, i * block, 0)

    return lax.fori_loop(0, used, put, jnp.zeros((len(x), kernel.shape[1 if transposed else 2]), x.dtype))


def _blocks_gradient(x: jax.Array, d_y: jax.Array, sizes: jax.Array, block: int) -> jax.Array:
    count = len(x) // block
    of, used = _group_of_blocks(sizes, block, count)
    if platform() != 'cpu' and 4 * count * x.shape[1] * d_y.shape[1] <= _SMALL:
        return _small_gradient(x, d_y, len(sizes), block, of)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        rows, d_rows = (lax.dynamic_slice_in_dim(array, i * block, block) for array in (x, d_y))
        part = lax.dot_general(rows, d_rows, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        own = lax.dynamic_index_in_dim(total, of[i], keepdims=False)
        return lax.dynamic_update_index_in_dim(total, own + part, of[i], 0)

    # On a GPU a loop whose length only the device knows asks the host in every round.
    rounds = used if platform() == 'cpu' else count
    return lax.fori_loop(0, rounds, add, jnp.zeros((len(sizes), x.shape[1], d_y.shape[1]), jnp.float32))


def _small_gradient(x: jax.Array, d_y: jax.Array, groups: int, block: int, of: jax.Array) -> jax.Array:
    """The gradients of all blocks at once, such as those of adapters' factors, then the sums of each group's."""
    rows, d_rows = x.reshape(-1, block, x.shape[1]), d_y.reshape(-1, block, d_y.shape[1])
    parts = lax.dot_general(rows, d_rows, (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)
    own = jax.nn.one_hot(of, groups, dtype=jnp.float32)
    return jnp.einsum('bg,bio->gio', own, parts, precision='highest')


_PRODUCTS: dict[str, Callable[..., jax.Array]] = {'megablox': _megablox, 'blocks': _blocks}
_GRADIENTS: dict[str, Callable[..., jax.Array]] = {'megablox': _megablox_gradient, 'blocks': _blocks_gradient}
