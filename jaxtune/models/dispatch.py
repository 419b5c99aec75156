"""Tokens to rows sorted by expert, and back: gathers both ways and in both directions, never a scattered sum."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.weights.grouped import Groups, choose


class Dispatch(NamedTuple):
    """Where each token's copies lie among the rows.

    Attributes:
      groups: the rows of each expert.
      pairs: int32 `[rows]`, which copy a row holds, counted over tokens and their `top_k`; beyond all of them for none.
      slots: int32 `[tokens, top_k]`, the row of each copy; beyond all of them where it goes nowhere.
    """

    groups: Groups
    pairs: jax.Array
    slots: jax.Array


def dispatch(chosen: jax.Array, experts: int, most: int) -> Dispatch:
    """The places of tokens that chose experts.

    Args:
      chosen: int32 `[tokens, top_k]`; numbers from `experts` on are none of these.
      experts: how many there are here.
      most: experts a token can have chosen here.
    """
    tokens, top_k = chosen.shape
    name, block, rows = choose(tokens * most, experts)
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    ordered = flat[order]
    ends = jnp.searchsorted(ordered, jnp.arange(experts, dtype=ordered.dtype), side='right').astype(jnp.int32)
    counts = jnp.diff(ends, prepend=0)
    sizes = -(-counts // block) * block
    moved = (jnp.cumsum(sizes) - sizes) - (ends - counts)  # how far filling up groups moves each of them
    here = ordered < experts
    at = jnp.arange(flat.size, dtype=jnp.int32) + moved[jnp.minimum(ordered, experts - 1)]
    at = jnp.where(here, at, rows)
    if name == 'megablox':
        # Sorted, rows lie as they are: on a TPU a second sort is much faster than a scatter.
        pairs = jnp.where(here, order, flat.size)
        pairs = jnp.pad(pairs, (0, max(0, rows - flat.size)), constant_values=flat.size)[:rows]
        slots = at[jnp.argsort(order)]
    else:
        pairs = jnp.full(rows, flat.size, jnp.int32).at[at].set(order, mode='drop', unique_indices=True)
        slots = jnp.zeros(flat.size, jnp.int32).at[order].set(at, unique_indices=True)
    return Dispatch(Groups(sizes, rows, block, name), pairs, slots.reshape(tokens, top_k))


def _rows(x: jax.Array, at: jax.Array) -> jax.Array:
    """Rows of `x`, zeros beyond the last."""
    return jnp.take(x, at, axis=0, mode='fill', fill_value=0)


@jax.custom_vjp
def spread(x: jax.Array, pairs: jax.Array, slots: jax.Array) -> jax.Array:
    """`[rows, d_model]`: for each row its token of `x` `[tokens, d_model]`."""
    return _rows(x, pairs // slots.shape[1])


def _spread_forward(x: jax.Array, pairs: jax.Array, slots: jax.Array) -> tuple[jax.Array, tuple]:
    return spread(x, pairs, slots), (pairs, slots)


def _spread_backward(residuals: tuple, d_rows: jax.Array) -> tuple[jax.Array, None, None]:
    return collect(d_rows, *residuals), None, None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def spread_weights(weights: jax.Array, pairs: jax.Array, slots: jax.Array) -> jax.Array:
    """`[rows]`: for each row what it weighs in its token's sum, of `weights` `[tokens, top_k]`; 0 for none."""
    return _rows(weights.reshape(-1), pairs)


def _weights_forward(weights: jax.Array, pairs: jax.Array, slots: jax.Array) -> tuple[jax.Array, tuple]:
    return spread_weights(weights, pairs, slots), (slots,)


def _weights_backward(residuals: tuple, d_rows: jax.Array) -> tuple[jax.Array, None, None]:
    (slots,) = residuals
    return _rows(d_rows, slots), None, None


spread_weights.defvjp(_weights_forward, _weights_backward)


@jax.custom_vjp
def collect(rows: jax.Array, pairs: jax.Array, slots: jax.Array) -> jax.Array:
    """`[tokens, d_model]`: the sum of each token's rows; the transpose of `spread`."""
    parts = (_rows(rows, slots[:, j]).astype(jnp.float32) for j in range(slots.shape[1]))
    return functools.reduce(jnp.add, parts).astype(rows.dtype)


def _collect_forward(rows: jax.Array, pairs: jax.Array, slots: jax.Array) -> tuple[jax.Array, tuple]:
    return collect(rows, pairs, slots), (pairs, slots)


def _collect_backward(residuals: tuple, d_y: jax.Array) -> tuple[jax.Array, None, None]:
    pairs, slots = residuals
    return spread(d_y, pairs, slots), None, None


collect.defvjp(_collect_forward, _collect_backward)
