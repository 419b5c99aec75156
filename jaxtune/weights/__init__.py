"""Leaves of the parameter tree and the one product that accepts any of them."""

from jaxtune.weights.leaf import dot, lookup

__all__ = ['dot', 'lookup']
