"""Dividing a parameter tree into the half that trains and the half that stays, and putting it together again."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxtune.parallel.rules import path_name
from jaxtune.weights.leaf import is_weight


def paths(tree: Any) -> list[str]:
    """Paths of all leaves as `a/b/c`, in the order of `jax.tree.leaves`."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def nested(leaves: Mapping[str, Any]) -> Any:
    """The tree of plain dicts whose leaves have the paths `a/b/c`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


# How many dimensions one layer's array has, by the last part of its path; a vector else.
_LAYER_DIMS = {'kernel': 2, 'embedding': 2, 'rows': 2, 'a': 2, 'b': 2, 'k': 3, 'v': 3}


def layer_dims(path: str) -> int:
    """How many of a leaf's dimensions are its own; those before are layers that it is stacked over."""
    return _LAYER_DIMS.get(path.rsplit('/', 1)[-1], 1)


def partition(tree: Any, trains: Callable[[str], bool]) -> tuple[Any, Any]:
    """`(trainable, frozen)`: two trees of the same structure, each with None where the other has the leaf."""
    keep = jax.tree_util.tree_map_with_path(lambda path, _: trains(path_name(path)), tree)
    trainable = jax.tree.map(lambda kept, leaf: leaf if kept else None, keep, tree)
    frozen = jax.tree.map(lambda kept, leaf: None if kept else leaf, keep, tree)
    return trainable, frozen


def combine(trainable: Any, frozen: Any) -> Any:
    """Undoes `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None)


def count(tree: Any) -> int:
    """Number of parameters, whatever they are stored as."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=is_weight))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves, over all devices together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
