"""LoRA: a low-rank update beside a frozen weight, which may itself be of any kind.

Hu et al. 2021, arXiv:2106.09685; with magnitudes apart from directions it is DoRA, Liu et al. 2024, arXiv:2402.09353.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxtune.parallel import fusion_barrier, in_order, platform
from jaxtune.weights.grouped import Groups, grouped_dot
from jaxtune.weights.leaf import Fit, Weight, dot, kernel_gradient, lookup, materialise


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['base', 'a', 'b', 'scale', 'magnitude', 'a_start', 'b_start'],
    meta_fields=['dropout', 'layers', 'shared'],
)
@dataclasses.dataclass(frozen=True)
class LoRA(Weight):
    """`base + scale * a @ b`, with DoRA scaled to a trained norm of every output's weights.

    Which weights have one, and how its factors begin, is `methods.lora`'s. A beginning other than zero (PiSSA) is taken
    off again: `base - scale * a_start @ b_start + scale * a @ b`.

    Ranks that differ between layers are filled up with zeros in both factors, which no gradient ever moves.

    Attributes:
      base: the frozen weight `[*layers, in, out]`, an array or a typed leaf.
      a: `[*layers, in, rank]`; where stacked experts share their factors, without the dimension of the experts.
      b: `[*layers, rank, out]`.
      scale: float32, of the stack's shape.
      magnitude: of every output's weights (DoRA), `[*layers, out]`, or None.
      a_start: like `a`, and `b_start` like `b`: factors whose product is taken off, so that training begins at the base
        whatever `a` and `b` begin with (PiSSA); or None.
      dropout: share of the inputs of `a` that training leaves out.
      layers: numbers of the stacked layers that `a` and `b` are for; None = all.
      shared: the base is of stacked experts, and one pair of factors is for all of a layer.
    """

    base: jax.Array | Weight
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    magnitude: jax.Array | None = None
    a_start: jax.Array | None = None
    b_start: jax.Array | None = None
    dropout: float = 0.0
    layers: tuple[int, ...] | None = None
    shared: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for, stacked."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Dimensions of the array that it stands for."""
        return len(self.base.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the array that it stands for."""
        return cast(Any, self.base).dtype  # every leaf that is wrapped has one

    @property
    def size(self) -> int:
        """Number of parameters: of the base, both factors and the magnitudes."""
        return sum(leaf.size for leaf in (self.base, self.a, self.b, self.magnitude) if leaf is not None)

    @property
    def original(self) -> jax.Array | Weight:
        """The base."""
        return self.base

    def dot(self, x: jax.Array, rng: jax.Array | None, matmul: str = '') -> jax.Array:
        """`[..., in] -> [..., out]` in the dtype of `x`; the factors are multiplied in it, whatever `matmul` says."""
        if not matmul and not (rng is not None and self.dropout) and self._summed_first(x):
            y = _sum_dot(x, (self.base, self.a_start, self.b_start, self.scale), self.a, self.b)
            return y if self.magnitude is None else (self.magnitude / self._lengths()).astype(x.dtype) * y

        def multiply(x: jax.Array, kernel: jax.Array | Weight) -> jax.Array:
            return dot(x, kernel, matmul=matmul if kernel is self.base else '')

        return self._dot(x, rng, multiply, lambda values: values)

    def product(self, x: jax.Array) -> tuple[str, str]:
        """Which product of the base `dot` runs, as `Weight.product` has it."""
        return self.base.product(x) if isinstance(self.base, Weight) else ('', '')

    def grouped_dot(self, x: jax.Array, groups: Groups, rng: jax.Array | None) -> jax.Array:
        """`[rows, in] -> [rows, out]` in the dtype of `x`, each row by its group's kernel."""

        def multiply(x: jax.Array, kernel: jax.Array | Weight) -> jax.Array:
            return grouped_dot(x, kernel, groups) if len(kernel.shape) > 2 else dot(x, kernel)

        def of_rows(values: jax.Array) -> jax.Array:
            rows = jnp.take(values, groups.of_rows(), axis=0) if values.ndim else values
            return rows[:, None] if rows.ndim == 1 else rows

        return self._dot(x, rng, multiply, of_rows)

    def by_group(self) -> 'LoRA':
        """The leaf with all its arrays stacked over groups, and its base wide."""
        base = self.base.by_group() if isinstance(self.base, Weight) else self.base
        if not self.shared:
            return dataclasses.replace(self, base=base)
        a, b, scale = (jnp.broadcast_to(x, (base.shape[0], *x.shape)) for x in (self.a, self.b, self.scale))
        return dataclasses.replace(self, base=base, a=a, b=b, scale=scale, shared=False)

    def _dot(
        self,
        x: jax.Array,
        rng: jax.Array | None,
        multiply: Callable[[jax.Array, Any], jax.Array],
        of_rows: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        """The product by parts: `multiply` by an array or leaf; `of_rows` gives each row the values of its kernel."""
        (x,) = fusion_barrier(x)  # for two products read it
        y, dropped = multiply(x, self.base), x
        if rng is not None and self.dropout:
            kept = jax.random.bernoulli(rng, 1.0 - self.dropout, x.shape)
            dropped = jnp.where(kept, x / (1.0 - self.dropout), 0).astype(x.dtype)
        scale = of_rows(self.scale).astype(x.dtype)
        update = multiply(multiply(dropped, _as_stacked(self.a)), self.b) * scale
        if self.a_start is not None:
            assert self.b_start is not None  # the two come together
            update = update - multiply(multiply(x, self.a_start), self.b_start) * scale
        if self.magnitude is None:
            return y + update
        factor = of_rows(self.magnitude / self._lengths()).astype(x.dtype)
        if dropped is x:
            return factor * (y + update)
        return y + (factor - 1.0) * multiply(dropped, self.base) + factor * update

    def _summed_first(self, x: jax.Array) -> bool:
        """Whether to add `a @ b` to the weight rather than its product with `x` to the output.

        That saves two products and a sum of the output's size in both directions, and costs one of the weight's size:
        a gain where there are more tokens than features. Only in float32 on a CPU: in bfloat16, which accelerators'
        products round float32 to as well, the sum would lose most of a small update.
        """
        return x.dtype == jnp.float32 and platform() == 'cpu' and math.prod(x.shape[:-1]) >= max(self.base.shape)

    def _lengths(self) -> jax.Array:
        """`[out]`: length of every output's weights; a constant to the gradient (DoRA's section 4.3)."""
        return jax.lax.stop_gradient(jnp.sqrt(jnp.square(self._sum()).sum(-2)))

    def _sum(self) -> jax.Array:
        """`base + scale * a @ b` in float32."""
        a, scaled = self.a, _scaled(self.scale, self.b)
        if self.shared:
            a, scaled = a[..., None, :, :], scaled[..., None, :, :]
        return _sum((self.base, self.a_start, self.b_start, self.scale), a, scaled)

    def lookup(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows for ids of any shape, `[*ids.shape, features]`."""
        rows = jnp.take(self.a, ids, axis=0).astype(dtype)
        return lookup(self.base, ids, dtype) + dot(rows, self.b) * self.scale.astype(dtype)

    def materialise(self) -> jax.Array:
        """The plain array that it stands for."""
        leaf = self.expand()
        wide = leaf._sum()
        if leaf.magnitude is not None:
            wide = wide * (leaf.magnitude / leaf._lengths())[..., None, :]
        return wide.astype(leaf.dtype)

    def specs(self, spec: P, fit: Fit) -> 'LoRA':
        """How its arrays lie on a mesh, where a plain kernel would lie as `spec`."""
        *stack, inputs, outputs = (*(None,) * (2 - len(spec)), *spec)
        own = () if self.shared else stack
        placed = {'a': P(*own, inputs, None), 'b': P(*own, None, outputs)}
        placed |= {'scale': P(*own), 'magnitude': P(*stack, outputs)}
        placed |= {'a_start': placed['a'], 'b_start': placed['b']}
        leaves = {name: getattr(self, name) for name in placed}
        base = self.base
        if base is not None:
            base = base.specs(spec, fit) if isinstance(base, Weight) else fit(spec, base.shape)
        return dataclasses.replace(
            self,
            base=base,
            **{n: None if leaf is None else fit(placed[n], leaf.shape, may_copy=True) for n, leaf in leaves.items()},
        )

    def expand(self) -> 'LoRA':
        """The leaf with factors for all layers; those it has none for get zeros."""
        if self.layers is None:
            return self
        count = self.base.shape[0]

        def spread(leaf: jax.Array | None, fill: float = 0.0) -> jax.Array | None:
            if leaf is None:
                return None
            return jnp.full((count, *leaf.shape[1:]), fill, leaf.dtype).at[jnp.asarray(self.layers)].set(leaf)

        magnitude = None
        if self.magnitude is not None:
            magnitude = jnp.sqrt(jnp.square(materialise(self.base).astype(jnp.float32)).sum(-2))
            magnitude = magnitude.astype(self.magnitude.dtype).at[jnp.asarray(self.layers)].set(self.magnitude)
        others = {name: spread(getattr(self, name)) for name in ('a', 'b', 'scale', 'a_start', 'b_start')}
        return dataclasses.replace(self, magnitude=magnitude, layers=None, **others)

    def eval_mode(self) -> 'LoRA':
        """The leaf without dropout."""
        return dataclasses.replace(self, dropout=0.0)


def _as_stacked(factor: jax.Array) -> jax.Array:
    """A layer's factor in the layout of the stack that it is a slice of.

    XLA's GPU compiler wants it the other way round, and would transpose a copy of the whole stack before the scan over
    the layers: 1 GB for a model of 65 billion parameters at rank 64.
    """
    return in_order(factor, *range(factor.ndim)) if platform() in ('gpu', 'cuda') else factor


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision='highest')


def _begun(frozen: tuple) -> jax.Array:
    """The frozen part of the sum, in float32: the base, less the product that training began with."""
    base, a_start, b_start, scale = frozen
    wide = materialise(base).astype(jnp.float32)
    return wide if a_start is None else wide - _product(a_start, _scaled(scale, b_start))


def _sum(frozen: tuple, a: jax.Array, scaled: jax.Array) -> jax.Array:
    """`base + a @ scaled` in float32."""
    return _begun(frozen) + _product(a, scaled)


def _wider_sum(frozen: tuple, a: jax.Array, scaled: jax.Array) -> jax.Array:
    """`base + a @ scaled` in float32, for one layer's factors that reach beyond the base, where it counts as zeros."""
    base, product = _begun(frozen), _product(a, scaled)
    inputs, outputs = base.shape
    # In place: a sum with a padded base would ask of every number whether it is one of the base's.
    return lax.dynamic_update_slice(product, base + product[:inputs, :outputs], (0, 0))


def _scaled(scale: jax.Array, b: jax.Array) -> jax.Array:
    return scale.astype(jnp.float32)[..., None, None] * b


@jax.custom_vjp
def _sum_dot(x: jax.Array, frozen: tuple, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(x, _sum(frozen, a, _scaled(frozen[-1], b)))


def _sum_dot_forward(x: jax.Array, frozen: tuple, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple]:
    """`x @ a`, which the gradient of `b` needs, is made with the output, as more columns of one product.

    A product as narrow as the rank takes as long as one several times as wide, and several of them 8 % of a step.
    """
    rank = a.shape[-1]
    both = jnp.dot(x, _wider_sum(frozen, a, jnp.concatenate([_scaled(frozen[-1], b), jnp.eye(rank)], axis=1)))
    y, inner = (checkpoint_name(part, 'product') for part in (both[..., :-rank], both[..., -rank:]))
    # The sum is not kept: adding again costs less than the memory.
    return y, (x, frozen, a, b, inner)


def _sum_dot_backward(residuals: tuple, d_y: jax.Array) -> tuple:
    """The wide gradient of the sum is never made; `d_y @ b.T` comes with `d_x`, as `x @ a` came with the output."""
    x, frozen, a, b, inner = residuals
    rank, scale = a.shape[-1], frozen[-1].astype(x.dtype)
    wide = _wider_sum(frozen, jnp.concatenate([a, jnp.eye(rank)]), _scaled(frozen[-1], b))
    both = lax.dot_general(d_y, wide, (((d_y.ndim - 1,), (1,)), ((), ())))
    d_x, d_inner = both[..., :-rank], both[..., -rank:]
    d_a, d_b = kernel_gradient(x, d_inner), kernel_gradient(inner * scale, d_y)
    return d_x, None, d_a.astype(a.dtype), d_b.astype(b.dtype)


_sum_dot.defvjp(_sum_dot_forward, _sum_dot_backward)
