"""The parts of a chunk's way through the vocabulary: logits, their loss, and its gradient on the way back.

What is computed over the whole vocabulary without all its logits (`cross_entropy`, `entropy`, `divergence`) is made of
these. All run on one device's part, as a `vocabulary.Plan` says.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.objectives.vocabulary import (
    Plan,
    scattered,
    uncut,
    vocab_of,
)
from jaxtune.weights import put_rows


def kernel_and_rows(head: Any, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """`(kernel, rows)`: the kernel with new rows in their places, through which no gradient goes, and those rows."""
    rows = getattr(head, 'rows', None)
    if rows is None:
        return head.kernel, None
    fixed = lax.stop_gradient(rows if head.vocab_major else rows.T)
    return put_rows(head.kernel.astype(dtype), fixed, head.ids, 0 if head.vocab_major else 1), rows


def readied(
    plan: Plan, dtype: Any, kernel: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """`(kernel, the kernel that logits are computed from, bias)`, with `plan.padding` more tokens."""
    kernel = kernel.astype(dtype)
    if plan.padding:
        bias = jnp.zeros(vocab_of(plan, kernel), jnp.float32) if bias is None else bias.astype(jnp.float32)
        bias = jnp.pad(bias, (0, plan.padding), constant_values=-jnp.inf)
        wider = (0, plan.padding)
        kernel = jnp.pad(kernel, (wider, (0, 0)) if plan.vocab_major else ((0, 0), wider))
    if plan.across:
        return kernel, lax.optimization_barrier(kernel.T), bias
    return kernel, kernel, bias


def logits_of(plan: Plan, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Float32 logits `[tokens, vocab on this device]`."""
    dims = (((1,), (1 if plan.vocab_major and not plan.across else 0,)), ((), ()))
    logits = lax.dot_general(hidden, kernel, dims, preferred_element_type=jnp.float32)
    if plan.scale != 1.0:
        logits = logits * plan.scale
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if plan.softcap is not None:
        logits = plan.softcap * jnp.tanh(logits / plan.softcap)
    return logits


def local_targets(plan: Plan, targets: jax.Array, kernel: jax.Array) -> jax.Array:
    """Target ids counted from this device's first token of the vocabulary; those elsewhere fall outside."""
    return targets - lax.axis_index(plan.vocab_axes) * vocab_of(plan, kernel) if plan.vocab_axes else targets


def score(plan: Plan, logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`(largest logit, exp(logits - largest), their sum, the target's logit)` over the whole vocabulary."""
    vocab = logits.shape[-1]
    inside = (targets >= 0) & (targets < vocab)
    picked = jnp.take_along_axis(logits, jnp.clip(targets, 0, vocab - 1)[:, None], axis=-1)
    largest = logits.max(-1, keepdims=True)
    if plan.vocab_axes:
        largest = lax.pmax(largest, plan.vocab_axes)
    exps = jnp.exp(logits - largest)
    total = exps.sum(-1, keepdims=True)
    if plan.vocab_axes:
        picked = lax.psum(jnp.where(inside[:, None], picked, 0.0), plan.vocab_axes)
        total = lax.psum(total, plan.vocab_axes)
    return largest, exps, total, picked


def logit_gradient(
    plan: Plan, logits: jax.Array, probabilities: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradient of `sum(weights * nll)` in the product of hidden and kernel, and in the bias's place."""
    onehot = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    grad = (probabilities - onehot) * weights[:, None]
    if plan.softcap is not None:
        grad = grad * (1.0 - jnp.square(logits / plan.softcap))
    return grad * plan.scale if plan.scale != 1.0 else grad, grad


def pull(
    plan: Plan,
    grad: tuple[jax.Array, jax.Array],
    hidden: jax.Array,
    kernel: jax.Array,
    sums: Any,
    wanted: Sequence[bool],
) -> tuple[jax.Array | None, Any]:
    """Gradient of one chunk's hidden; adds its kernel's, bias's and new rows' to `sums`."""
    (product, plain), (d_kernel, d_bias, d_rows) = grad, sums
    product = product.astype(hidden.dtype)
    d_hidden = None
    if wanted[0]:
        dims = (((1,), (0 if plan.vocab_major else 1,)), ((), ()))
        sums_of = jnp.float32 if plan.gather_axes else hidden.dtype
        d_hidden = lax.dot_general(product, kernel, dims, preferred_element_type=sums_of)
        d_hidden = scattered(plan, d_hidden).astype(hidden.dtype)
    if wanted[1]:
        pair = (product, hidden) if plan.vocab_major else (hidden, product)
        d_kernel += lax.dot_general(*pair, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    if wanted[2]:
        d_bias += plain.sum(0)
    if wanted[3]:
        places = local_targets(plan, jnp.asarray(plan.ids, jnp.int32), kernel)
        places = jnp.where(places < 0, 2**30, places)  # a negative one would count from the end
        own = jnp.take(product, places, axis=1, mode='fill', fill_value=0)
        d_rows += lax.dot_general(own, hidden, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return d_hidden, (d_kernel, d_bias, d_rows)


def zeros(
    plan: Plan, kernel: jax.Array, bias: jax.Array | None, wanted: Sequence[bool]
) -> tuple[jax.Array | None, ...]:
    """What `pull` adds the gradients of kernel, bias and new rows to; None for one not wanted."""
    d_kernel = jnp.zeros(kernel.shape, jnp.float32) if wanted[1] else None
    d_bias = None if bias is None or not wanted[2] else jnp.zeros(bias.shape, jnp.float32)
    width = kernel.shape[1 if plan.vocab_major else 0]
    return d_kernel, d_bias, jnp.zeros((len(plan.ids), width), jnp.float32) if wanted[3] else None


def collect(
    plan: Plan, d_hidden: Any, sums: Any, shape: tuple[int, ...], wanted: Sequence[bool]
) -> tuple[jax.Array | None, ...]:
    """Sums the gradients over the devices that share them, once."""
    d_kernel, d_bias, d_rows = sums
    tokens = tuple(axis for axis in plan.token_axes if axis not in plan.gather_axes)
    if plan.padding and wanted[1]:
        d_kernel = d_kernel[: -plan.padding] if plan.vocab_major else d_kernel[:, : -plan.padding]
    if plan.padding and wanted[2]:
        d_bias = d_bias[: -plan.padding]
    if wanted[0]:
        d_hidden = uncut(d_hidden, *shape)
        rest = tuple(axis for axis in plan.vocab_axes if axis not in plan.gather_axes)
        if rest:
            d_hidden = lax.psum(d_hidden, rest)
    if wanted[1]:
        rest = tuple(axis for axis in tokens if axis not in plan.scatter_axes)
        if rest:
            d_kernel = lax.psum(d_kernel, rest)
        if plan.scatter_axes:
            width = 1 if plan.vocab_major else 0
            d_kernel = lax.psum_scatter(d_kernel, plan.scatter_axes, scatter_dimension=width, tiled=True)
    if wanted[2] and tokens:
        d_bias = lax.psum(d_bias, tokens)
    if wanted[3] and tokens + plan.vocab_axes:
        d_rows = lax.psum(d_rows, tokens + plan.vocab_axes)
    return d_hidden, d_kernel, d_bias, d_rows
