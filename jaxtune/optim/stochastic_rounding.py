"""Stochastic rounding: parameters of 16 bits that learn from updates smaller than the gap between two of their numbers.

A float32 number becomes one of its two neighbours in bfloat16, the nearer one more often, so that it is right on
average (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", arXiv:1502.02551). Rounded to the nearest,
most updates of a small learning rate would change nothing at all.
"""

import functools
import zlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.parallel.rules import path_name


def apply_updates(params: Any, updates: Any, key: jax.Array, layer: jax.Array | None = None) -> Any:
    """Adds float32 updates to parameters; sums that are kept in bfloat16 are rounded stochastically.

    Args:
      params: tree of arrays.
      updates: the same tree, float32.
      key: of this update. An element's bits are a function of it, of the leaf's path and of the element's place.
      layer: int32, whose parameters these are where they are one layer of stacks: they get its bits; else None.
    """

    def add(path: tuple, param: jax.Array, update: jax.Array) -> jax.Array:
        chex.assert_shape(update, param.shape, custom_message=f'updates: {path_name(path)}')
        if param.dtype != jnp.bfloat16:
            return (param + update).astype(param.dtype)
        number = jax.random.bits(jax.random.fold_in(key, zlib.crc32(path_name(path).encode())), (), jnp.uint32)
        if layer is not None:
            number = _at(number, layer.astype(jnp.uint32))
        return to_bfloat16(param.astype(jnp.float32) + update, number)

    return jax.tree_util.tree_map_with_path(add, params, updates)


def to_bfloat16(value: jax.Array, number: jax.Array) -> jax.Array:
    """A float32 array rounded stochastically; one that bfloat16 can hold stays as it is.

    Args:
      value: float32.
      number: uint32 scalar that the random bits are made from.
    """
    chex.assert_type(value, jnp.float32, custom_message='value')
    chex.assert_shape(number, (), custom_message='number')
    chex.assert_type(number, jnp.uint32, custom_message='number')
    bits = lax.bitcast_convert_type(value, jnp.uint32)
    # bfloat16 is float32 without its last 16 bits: of two neighbours the sum reaches the further one in proportion.
    rounded = (bits + (_noise(value.shape, number) >> 16)) >> 16
    rounded = lax.bitcast_convert_type(rounded.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(value), rounded, value.astype(jnp.bfloat16))


def _noise(shape: tuple[int, ...], number: jax.Array) -> jax.Array:
    """uint32 of a shape, each a hash of its place and `number`.

    Cheaper than `jax.random.bits`, and a part of whatever elementwise loop uses it: nothing of the array's size is
    stored, and a mesh divides it as it divides the array.
    """
    places = (lax.broadcasted_iota(jnp.uint32, shape, dim) for dim in range(len(shape)))
    return functools.reduce(_at, places, number)


def _at(mixed: jax.Array, place: jax.Array) -> jax.Array:
    """The hash of a further dimension's place."""
    return _mix(mixed + place * jnp.uint32(0x9E3779B9))


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 whose every output bit depends on every input bit (Wellons 2018, "lowbias32")."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
