"""New rows: embeddings of added tokens that train, beside a frozen table or head that stays bit-identical."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxtune.weights.leaf import Fit, Weight, dot, lookup, materialise


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['base', 'rows'],
    meta_fields=['ids', 'axis'],
)
@dataclasses.dataclass(frozen=True)
class NewRows(Weight):
    """`base` with the vectors of some tokens replaced, and with those of further tokens after its last one.

    Attributes:
      base: the frozen table `[vocab, features]`, or head `[features, vocab]`: an array or a typed leaf.
      rows: float32 `[new, features]`, whichever way the base lies.
      ids: of the tokens that these rows are, ascending; those from the base's `vocab` on leave no gap.
      axis: dimension of the base along which its tokens lie: 0 of a table, 1 of a head.
    """

    base: jax.Array | Weight
    rows: jax.Array
    ids: tuple[int, ...]
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""
        shape = list(self.base.shape)
        shape[self.axis] = max(shape[self.axis], self.ids[-1] + 1)
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """Dimensions of the array that it stands for."""
        return 2

    @property
    def dtype(self) -> jnp.dtype:
        """Of the array that it stands for."""
        return cast(Any, self.base).dtype  # every leaf that is wrapped has one

    @property
    def size(self) -> int:
        """Number of parameters among its arrays that are there."""
        return sum(leaf.size for leaf in (self.base, self.rows) if leaf is not None)

    @property
    def original(self) -> jax.Array | Weight:
        """The base."""
        return self.base

    def dot(self, x: jax.Array, rng: jax.Array | None, matmul: str = '') -> jax.Array:
        """`[..., in] -> [..., out]` in the dtype of `x`; `matmul` as for `leaf.dot`."""
        if self.axis == 0:
            return dot(x, self.materialise(), matmul=matmul)
        return put_rows(dot(x, self.base, rng, matmul), dot(x, self.rows.T), self.ids, -1)

    def product(self, x: jax.Array) -> tuple[str, str]:
        """Which product of the base `dot` runs, as `Weight.product` has it."""
        return self.base.product(x) if self.axis and isinstance(self.base, Weight) else ('', '')

    def lookup(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows for ids of any shape, `[*ids.shape, features]`."""
        if self.axis:
            return lookup(self.materialise(), ids, dtype)
        places, new = self._places(ids)
        old = lookup(self.base, jnp.where(new, 0, ids), dtype)
        return jnp.where(new[..., None], jnp.take(self.rows, places, axis=0).astype(dtype), old)

    def _places(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of each id the place among the rows (any of them where it is not new), and whether it is new."""
        if self.ids[-1] - self.ids[0] == len(self.ids) - 1:
            places = ids - self.ids[0]
            new = (places >= 0) & (places < len(self.ids))
            return jnp.where(new, places, 0), new
        known = jnp.asarray(self.ids, ids.dtype)
        places = jnp.minimum(jnp.searchsorted(known, ids), len(self.ids) - 1)
        return places, known[places] == ids

    def materialise(self) -> jax.Array:
        """The plain array that it stands for."""
        return put_rows(materialise(self.base), self.rows.T if self.axis else self.rows, self.ids, self.axis)

    def specs(self, spec: P, fit: Fit) -> 'NewRows':
        """How its arrays lie on a mesh, where a plain table or kernel would lie as `spec`."""
        both = (*(None,) * (2 - len(spec)), *spec)[-2:]
        base, rows = self.base, self.rows
        if base is not None:
            base = base.specs(spec, fit) if isinstance(base, Weight) else fit(spec, base.shape)
        if rows is not None:
            rows = fit(P(None, both[1 - self.axis]), rows.shape, may_copy=True)
        return dataclasses.replace(self, base=base, rows=rows)


def put_rows(base: jax.Array, new: jax.Array, ids: tuple[int, ...], axis: int) -> jax.Array:
    """`base` with the slices `ids` of an axis replaced by those of `new`, and longer where ids lie beyond its end.

    Args:
      base: `[..., vocab, ...]`.
      new: `[..., len(ids), ...]`, cast to the dtype of `base`.
      ids: ascending; those from `vocab` on leave no gap.
      axis: of both arrays.
    """
    base, new = jnp.moveaxis(base, axis, 0), jnp.moveaxis(new.astype(base.dtype), axis, 0)
    inside = sum(token < base.shape[0] for token in ids)
    if inside:
        base = base.at[jnp.asarray(ids[:inside])].set(new[:inside])
    if inside < len(ids):
        base = jnp.concatenate([base, new[inside:]])
    return jnp.moveaxis(base, 0, axis)
