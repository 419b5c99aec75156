"""The two things a model ever does with a weight, multiply by it and look rows up in it, whatever kind it is."""

from typing import TYPE_CHECKING, Any, Protocol

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxtune.parallel import one_cpu
from jaxtune.weights.low_precision import low_dot

if TYPE_CHECKING:
    from jaxtune.weights.grouped import Groups


class Fit(Protocol):
    """Fits a spec to a shape: aligned to the last dimensions, without axes that do not divide theirs.

    A large array that is left whole is divided by another axis or dimension, and refused where there is none and it
    may not be copied to every device.
    """

    def __call__(self, spec: P, shape: tuple[int, ...], may_copy: bool = False) -> P:
        """The spec that an array of this shape gets."""
        ...


class Weight:
    """A typed leaf: a pytree of arrays that stands where a kernel `[in, out]` or an embedding `[rows, features]` could.

    Layers are stacked on leading axes of all its arrays, so that a scan may slice it. Where a tree is partitioned, its
    arrays are None in one half.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for, stacked."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Number of parameters among its arrays that are there."""
        raise NotImplementedError

    def dot(self, x: jax.Array, rng: jax.Array | None, matmul: str = '') -> jax.Array:
        """`[..., in] -> [..., out]` in the dtype of `x`; `matmul` as for the function `dot`."""
        raise NotImplementedError

    def product(self, x: jax.Array) -> tuple[str, str]:
        """Which product `dot` runs for `x`, and why a fused kernel could not where one is wanted; '' = no choice."""
        return '', ''

    def grouped_dot(self, x: jax.Array, groups: 'Groups', rng: jax.Array | None) -> jax.Array:
        """`[rows, in] -> [rows, out]` in the dtype of `x`, each row by its group's kernel of `[groups, in, out]`."""
        raise NotImplementedError

    def by_group(self) -> 'jax.Array | Weight':
        """The leaf of `[groups, in, out]` with all its arrays stacked over groups, and wide where it is quantised."""
        return self

    def lookup(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows for ids of any shape, `[*ids.shape, features]`."""
        return lookup(self.materialise(), ids, dtype)

    def materialise(self) -> jax.Array:
        """The plain array that it stands for."""
        raise NotImplementedError

    def specs(self, spec: P, fit: Fit) -> 'Weight':
        """How its arrays lie on a mesh, where a plain kernel would lie as `spec`: the same leaf of `PartitionSpec`s."""
        raise NotImplementedError

    @property
    def original(self) -> 'jax.Array | Weight':
        """The weight that a method has wrapped, without what it added."""
        return self

    def expand(self) -> 'Weight':
        """The leaf with all its arrays stacked over all layers, as a scan needs it."""
        return self

    def eval_mode(self) -> 'Weight':
        """The leaf without what only training does."""
        return self


def is_weight(leaf: Any) -> bool:
    """Whether a node of a tree is a typed leaf; for `is_leaf`."""
    return isinstance(leaf, Weight)


def dot(x: jax.Array, kernel: jax.Array | Weight, rng: jax.Array | None = None, matmul: str = '') -> jax.Array:
    """Multiplies activations `[..., in]` by a kernel `[in, out]` in the dtype of `x`; returns `[..., out]`.

    Args:
      x: the activations.
      kernel: an array or a typed leaf.
      rng: key for dropout in the leaf, or None.
      matmul: `fp8` or `int8`, what the model's own kernel is multiplied in (`low_precision`); '' = the dtype of `x`.
    """
    chex.assert_equal(kernel.shape[:-1], x.shape[-1:], custom_message='kernel: [in, out] for x [..., in]')
    if isinstance(kernel, Weight):
        return kernel.dot(x, rng, matmul) if matmul else kernel.dot(x, rng)  # a leaf of one's own may know no `matmul`
    kernel = kernel.astype(x.dtype)
    return low_dot(x, kernel, matmul) if matmul else _dot(x, kernel)


@jax.custom_vjp
def _dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.dot(x, kernel)


def _dot_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    return jnp.dot(x, kernel), (x, kernel)


def _dot_backward(residuals: tuple, d_y: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    d_x = lax.dot_general(d_y, kernel, (((d_y.ndim - 1,), (1,)), ((), ())))
    return d_x, kernel_gradient(x, d_y)


_dot.defvjp(_dot_forward, _dot_backward)


def kernel_gradient(x: jax.Array, d_y: jax.Array) -> jax.Array:
    """Gradient `[in, out]` of a kernel between `x` `[..., in]` and an output whose gradient is `d_y` `[..., out]`.

    XLA:CPU writes the factor on the left anew, transposed, with all the arithmetic that made it fused into strided
    writes: the narrower one belongs there. The result is then transposed in a step of its own, or XLA would fold the
    two into a product the other way round, and leave that to a slower library.
    """
    rows = tuple(range(x.ndim - 1))
    if x.shape[-1] <= d_y.shape[-1] or not one_cpu():
        return lax.dot_general(x, d_y, ((rows, rows), ((), ())))
    return lax.optimization_barrier(lax.dot_general(d_y, x, ((rows, rows), ((), ())))).T


def lookup(embedding: jax.Array | Weight, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of an embedding `[vocab, d_model]` for integer `ids` of any shape; returns `[*ids.shape, d_model]`."""
    chex.assert_type(ids, int, custom_message='ids')
    chex.assert_equal(len(embedding.shape), 2, custom_message='embedding: [vocab, d_model]')
    if isinstance(embedding, Weight):
        return embedding.lookup(ids, dtype)
    if embedding.dtype == jnp.float32:
        return jnp.take(embedding, ids, axis=0).astype(dtype)
    return _narrow_rows(embedding, ids).astype(dtype)


@jax.custom_vjp
def _narrow_rows(embedding: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table of fewer bits than float32, whose gradient is added up in float32.

    A frequent token's row gets thousands of summands, of which a bfloat16 sum would lose most.
    """
    return jnp.take(embedding, ids, axis=0)


def _narrow_rows_forward(embedding: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple]:
    return _narrow_rows(embedding, ids), (embedding, ids)


def _narrow_rows_backward(residuals: tuple, d_rows: jax.Array) -> tuple[jax.Array, None]:
    embedding, ids = residuals
    wide = jnp.zeros(embedding.shape, jnp.float32).at[ids].add(d_rows.astype(jnp.float32))
    return wide.astype(embedding.dtype), None


_narrow_rows.defvjp(_narrow_rows_forward, _narrow_rows_backward)


def materialise(weight: jax.Array | Weight) -> jax.Array:
    """The plain array that a leaf stands for; differentiable in its arrays."""
    return weight.materialise() if isinstance(weight, Weight) else weight


def expand(tree: Any) -> Any:
    """A tree whose leaves are ready to be scanned over layers."""
    return jax.tree.map(lambda leaf: leaf.expand() if is_weight(leaf) else leaf, tree, is_leaf=is_weight)


def eval_mode(tree: Any) -> Any:
    """A tree without what only training does, such as dropout."""
    return jax.tree.map(lambda leaf: leaf.eval_mode() if is_weight(leaf) else leaf, tree, is_leaf=is_weight)


def merge_weights(tree: Any) -> Any:
    """A tree with plain arrays for its typed leaves, updates added.

    From NF4, that is the dequantised weights that the update was trained against.
    """
    return jax.tree.map(lambda leaf: _materialised(leaf) if is_weight(leaf) else leaf, tree, is_leaf=is_weight)


_materialised = jax.jit(materialise)
