"""Dividing a parameter tree into the half that trains and the half that stays, and putting it together again."""

from collections.abc import Callable

import jax

from jaxtune.parallel.rules import path_name


def paths(tree) -> list[str]:
    """Paths of all leaves as `a/b/c`, in the order of `jax.tree.leaves`."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def partition(tree, trains: Callable[[str], bool]):
    """`(trainable, frozen)`: two trees of the same structure, each with None where the other has the leaf."""
    keep = jax.tree_util.tree_map_with_path(lambda path, _: trains(path_name(path)), tree)
    trainable = jax.tree.map(lambda kept, leaf: leaf if kept else None, keep, tree)
    frozen = jax.tree.map(lambda kept, leaf: None if kept else leaf, keep, tree)
    return trainable, frozen


def combine(trainable, frozen):
    """Undoes `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None)


def count(tree) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def nbytes(tree) -> int:
    """Bytes of all leaves, over all devices together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
