"""AdamW whose two moments are eight-bit numbers in blocks that share a scale: a quarter of the state's bytes.

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861. As there, small parameters keep
float32 moments. Codes lie as the parameter does, so that a mesh divides both alike.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxtune.parallel.rules import path_name
from jaxtune.weights.blockwise8 import nearest_code, nearly
from jaxtune.weights.tree import layer_dims

BLOCK = 256
LARGE = 2**24  # elements of a stack of layers
SMALLEST = 4096  # elements of a layer's parameter; with fewer, state is not worth saving


class Moment(NamedTuple):
    """A moment in eight bits: uint8 `codes` of the parameter's shape, float32 `scales`, one a block."""

    codes: jax.Array
    scales: jax.Array


def _by_layers(rule: Callable[..., Any], grad: jax.Array, *moments: Any) -> Any:
    """A rule on a parameter; on a large stack layer by layer, so that one layer's moments are wide at a time.

    What the rule returns, which is like what it is given, takes its place: no second array of the stack is made.
    """
    if grad.ndim < 3 or grad.size < LARGE:
        return rule(grad, *moments)

    def one(i: jax.Array, stack: Any) -> Any:
        layer = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stack)
        return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0), stack, rule(*layer))

    return jax.lax.fori_loop(0, grad.shape[0], one, (grad, *moments))


class State(NamedTuple):
    """Updates done, and the moments of every parameter: `Moment`, or a float32 array of small ones."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # checkpoints name it so
    mu: Any
    nu: Any


def _blocks(shape: tuple[int, ...], dims: int) -> tuple[tuple[int, ...], int]:
    """`(leading dimensions, elements)` that cut into blocks: the last one, or where it is narrow a whole layer's."""
    dims = 1 if shape[-1] % BLOCK == 0 else min(dims, len(shape))
    return shape[:-dims], math.prod(shape[-dims:])


def encode(value: jax.Array, signed: bool, dims: int = 2) -> Moment:
    """A float32 array in eight bits; its last `dims` dimensions are one layer's."""
    chex.assert_type(value, jnp.float32, custom_message='value')
    leading, count = _blocks(value.shape, dims)
    blocks = -(-count // BLOCK)
    flat = value.reshape(*leading, count)
    padded = jnp.pad(flat, [(0, 0)] * len(leading) + [(0, blocks * BLOCK - count)]).reshape(*leading, blocks, BLOCK)
    scales = jnp.abs(padded).max(-1)
    codes = nearest_code(padded / jnp.where(scales > 0, scales, 1.0)[..., None], signed)
    if not signed:  # a second moment that became 0 would make its update endless
        codes = jnp.where(padded > 0, jnp.maximum(codes, 1), codes)
    return Moment(codes.reshape(*leading, -1)[..., :count].reshape(value.shape), scales)


def wide(moment: Moment | jax.Array, signed: bool, dims: int = 2) -> jax.Array:
    """The float32 array."""
    if not isinstance(moment, Moment):
        return moment
    leading, count = _blocks(moment.codes.shape, dims)
    chex.assert_type(moment.codes, jnp.uint8, custom_message='moment.codes')
    chex.assert_shape(moment.scales, (*leading, -(-count // BLOCK)), custom_message='moment.scales')
    scales = jnp.repeat(moment.scales, BLOCK, axis=-1)[..., :count]
    return (nearly(moment.codes, signed).reshape(*leading, count) * scales).reshape(moment.codes.shape)


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam's rule (Kingma and Ba 2014, arXiv:1412.6980) on eight-bit moments; steps in the gradients' dtype."""

    def init(params: Any) -> State:
        def zeros(signed: bool) -> Any:
            def of(path: tuple, leaf: jax.Array) -> Moment | jax.Array:
                value, dims = jnp.zeros(leaf.shape), layer_dims(path_name(path))
                return encode(value, signed, dims) if math.prod(leaf.shape[-dims:]) >= SMALLEST else value

            return jax.tree_util.tree_map_with_path(of, params)

        return State(jnp.zeros((), jnp.int32), zeros(True), zeros(False))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, State]:
        count = state.count + 1
        correct1, correct2 = 1.0 - b1**count, 1.0 - b2**count

        def rule(
            dims: int, grad: jax.Array, mu: Moment | jax.Array, nu: Moment | jax.Array
        ) -> tuple[jax.Array, Moment | jax.Array, Moment | jax.Array]:
            def alike(value: jax.Array, signed: bool, was: Moment | jax.Array) -> Moment | jax.Array:
                return encode(value, signed, dims) if isinstance(was, Moment) else value

            grad32 = grad.astype(jnp.float32)
            new_mu = b1 * wide(mu, True, dims) + (1.0 - b1) * grad32
            new_nu = b2 * wide(nu, False, dims) + (1.0 - b2) * jnp.square(grad32)
            step = (new_mu / correct1) / (jnp.sqrt(new_nu / correct2) + eps)
            return step.astype(grad.dtype), alike(new_mu, True, mu), alike(new_nu, False, nu)

        leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
        moments = [structure.flatten_up_to(tree) for tree in (state.mu, state.nu)]
        results = [
            _by_layers(functools.partial(rule, layer_dims(path_name(path))), grad, *moment)
            for (path, grad), *moment in zip(leaves, *moments, strict=True)
        ]
        steps, mu, nu = (structure.unflatten(part) for part in zip(*results, strict=True))
        return steps, State(count, mu, nu)

    return optax.GradientTransformation(init, update)
