"""Rows for tokens that a model did not have: where they stand, what they begin as, and whether they alone train."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError
from jaxtune.methods import BoundMethod
from jaxtune.models.model import Model, leaf_paths
from jaxtune.weights import NewRows, Weight, is_weight, lookup, materialise, put_rows
from jaxtune.weights.tree import nested

# Path of a parameter with one vector, or number, a token -> its dimension that counts tokens.
_AXES = {
    'embed_tokens/embedding': 0,
    'shared/embedding': 0,
    'lm_head/kernel': 1,
    'lm_head/decoder/kernel': 1,
    'lm_head/bias': 0,
}


@dataclasses.dataclass(frozen=True, eq=False)
class NewTokens:
    """The tokens for which a model gets rows.

    Attributes:
      vocab_size: rows that the model has with them.
      ids: of tokens whose rows begin anew, ascending; from the old number of rows on there is no gap.
      used: bool `[old vocab_size]`: rows of tokens that there were; no others are part of a mean.
      descriptions: of each id, tokens whose mean its rows begin as; () = the mean of all that are used.
      held: further new tokens, whose rows an adapter has; what it does not have of them, a bias, begins anew.
    """

    vocab_size: int
    ids: tuple[int, ...]
    used: np.ndarray
    descriptions: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    held: tuple[int, ...] = ()

    def starts(self, table: jax.Array | Weight, axis: int) -> jax.Array:
        """What new rows begin as.

        Args:
          table: the old table `[vocab, features]`, or head `[features, vocab]`.
          axis: its dimension that counts tokens.

        Returns:
          float32 `[new, features]`.
        """
        if axis == 1 or isinstance(table, Weight):
            table = jnp.moveaxis(materialise(table), axis, 0)
        mean = self._mean(table)
        described = [tuple(t for t in self.descriptions.get(i, ()) if self._is_used(t)) for i in self.ids]
        rows = jnp.broadcast_to(mean, (len(self.ids), *mean.shape))
        flat = np.asarray([token for tokens in described for token in tokens], np.int32)
        if not flat.size:
            return rows
        owners = np.repeat(np.arange(len(described)), [len(tokens) for tokens in described])
        sums = jax.ops.segment_sum(lookup(table, jnp.asarray(flat), jnp.float32), owners, len(described))
        counts = np.asarray([len(tokens) for tokens in described], np.float32)[:, None]
        return jnp.where(counts > 0, sums / np.maximum(counts, 1), rows)

    def with_bias(self, bias: jax.Array) -> jax.Array:
        """A bias `[vocab]` with the mean for new tokens: how often one comes, its description does not tell."""
        ids = tuple(sorted({*self.ids, *self.held}))
        return put_rows(bias, jnp.broadcast_to(self._mean(bias), (len(ids),)), ids, 0)

    def _mean(self, table: jax.Array) -> jax.Array:
        used = jnp.asarray(self.used)[:, *(None,) * (table.ndim - 1)]
        return jnp.where(used, table.astype(jnp.float32), 0.0).sum(0) / max(1, int(self.used.sum()))

    def _is_used(self, token: int) -> bool:
        return token < len(self.used) and bool(self.used[token])


def check(method: BoundMethod) -> None:
    """Refuses a method that freezes the model and whose adapter holds no rows.

    Raises:
      UserError: names the key.
    """
    if not method.method.new_rows:
        raise UserError(
            f'tokenizer.add: method.name={method.method.name}: an adapter of it holds no rows of tokens; expected '
            'full, lora, qlora or adapter'
        )


def grow(params: Any, model: Model, new: NewTokens, method: BoundMethod, whole: frozenset[str] = frozenset()) -> Any:
    """The tree with rows for new tokens; traced. Those that it has already, of an adapter, stay as they are.

    A table that trains whole becomes a larger array; else its new rows train beside it, as a `NewRows` leaf. A bias is
    an array in either case.

    Args:
      params: the tree over a model of as many rows as `new.used` has.
      model: the model with all rows.
      new: the tokens.
      method: says which leaves train.
      whole: paths of further leaves that train whole.

    Raises:
      UserError: a table is adapted in another way.
    """
    leaves = leaf_paths(params)
    for path, axis in _AXES.items():
        leaf = leaves.get(path)
        if leaf is None:
            continue
        if path.endswith('bias'):
            leaves[path] = new.with_bias(leaf) if leaf.shape[0] == len(new.used) else leaf
        elif isinstance(leaf, NewRows):
            leaves[path] = _extended(leaf, new)
        elif is_weight(leaf):
            name = model.tensors[path].name.removesuffix('.weight')
            raise UserError(
                f'method.targets: {name} is adapted, and gets new rows by tokenizer.add; expected other modules'
            )
        elif new.ids and leaf.shape[axis] == len(new.used):  # else an adapter has brought it along with all its rows
            rows = new.starts(leaf, axis)
            if method.method.trains(path) or path in whole:
                leaves[path] = put_rows(leaf, rows.T if axis else rows, new.ids, axis)
            else:
                leaves[path] = NewRows(leaf, rows, new.ids, axis)
    return nested(leaves)


def _extended(leaf: NewRows, new: NewTokens) -> NewRows:
    """An adapter's rows with those that it lacks."""
    lacking = [i for i, token in enumerate(new.ids) if token not in set(leaf.ids)]
    if not lacking:
        return leaf
    ids = np.asarray([*leaf.ids, *(new.ids[i] for i in lacking)])
    rows = jnp.concatenate([leaf.rows, new.starts(leaf.base, leaf.axis)[np.asarray(lacking)]])
    order = np.argsort(ids)
    return dataclasses.replace(leaf, rows=rows[order], ids=tuple(ids[order].tolist()))


def table_names(model: Model) -> dict[str, str]:
    """Path of each table and head of tokens -> its module's name in a Hugging Face folder."""
    return {
        path: model.tensors[path].name.removesuffix('.weight')
        for path in _AXES
        if path in model.tensors and not path.endswith('bias')
    }


def axis_of(path: str) -> int:
    """Dimension of a table or head that counts tokens."""
    return _AXES[path]
