"""Cross-entropy over a vocabulary without ever holding all logits.

The projection to the vocabulary and its loss run together over chunks of tokens, so memory is `chunk x vocab` instead
of `batch x length x vocab`. Where every token's share in the loss is known beforehand, the gradient is made in the same
pass: three matrix products instead of the four of a backward pass that computes the logits again (Wijmans et al. 2024,
"Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009, has the idea of a fused loss).

On a mesh every device has its own part of the vocabulary, over `tensor` and, where that moves fewer bytes, over `fsdp`:
there a chunk's tokens are gathered, and their gradients scattered back, instead of the kernel and its gradient. A chunk
exchanges one number a token beside; the kernel's gradient is summed over the other batch axes once, after the last.

New rows beside a frozen kernel (`weights.NewRows`) are put into their places once; they alone have a gradient.

On a single CPU the logits are computed from a copy of the kernel `[d_model, vocab]`, a little wider than the vocabulary
where rows of logits would lie a multiple of 4 KiB apart: Eigen's product is half as fast otherwise.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxtune.objectives.vocabulary import (
    Plan,
    chunks,
    gathered,
    make_plan,
    own,
    per_device,
    scattered,
    specs_of,
    uncut,
    vocab_of,
)
from jaxtune.weights import put_rows


@jax.named_scope('vocabulary')
def cross_entropy(
    hidden: jax.Array, head: Any, targets: jax.Array, weights: jax.Array, *, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of the targets' negative log-likelihoods.

    Args:
      hidden: `[batch, length, d_model]`, after the final norm.
      head: `Model.head(params)`: `kernel` (`[vocab, d_model]` if `vocab_major`, else `[d_model, vocab]`), `bias`
        (`[vocab]` or None), `softcap`, `scale`, and maybe `rows` with their `ids`.
      targets: `[batch, length]` int32; any value where the weight is 0.
      weights: `[batch, length]` float32.
      chunk: tokens at a time on one device, at most; by default what gives logits of 32 MiB, at least 512.

    Returns:
      `(loss_sum, correct_sum)`: float32 scalars, `sum(weights * nll)` in nats and the weighted number of targets whose
      logit is the largest. Differentiable in `hidden`, `kernel`, `bias`, `rows` and `weights`.
    """
    kernel, rows = _parts(head, hidden.dtype)
    plan = make_plan(hidden, head, kernel, chunk)
    targets = jnp.clip(targets, 0, vocab_of(head, kernel) - 1)
    return _cross_entropy(plan, hidden, kernel, head.bias, rows, targets, weights.astype(jnp.float32))


@jax.named_scope('vocabulary')
def token_logprobs(hidden: jax.Array, head: Any, targets: jax.Array, *, chunk: int | None = None) -> jax.Array:
    """Log-probability of every target.

    Args:
      hidden: `[batch, length, d_model]`, after the final norm.
      head: as for `cross_entropy`.
      targets: `[batch, length]` int32, each in `[0, vocab)`.
      chunk: as for `cross_entropy`.

    Returns:
      `[batch, length]` float32, in nats. Differentiable in `hidden`, `kernel`, `bias` and `rows`; the backward pass
      computes the logits again, chunk by chunk.
    """
    kernel, rows = _parts(head, hidden.dtype)
    return _token_logprobs(make_plan(hidden, head, kernel, chunk), hidden, kernel, head.bias, rows, targets)


@jax.named_scope('vocabulary')
def token_scores(
    hidden: jax.Array, head: Any, targets: jax.Array, *, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every target, and whether its logit is the largest: `[batch, length]` float32 and bool.

    Arguments as for `token_logprobs`. For evaluation: a gradient would hold all logits.
    """
    kernel, _ = _parts(head, hidden.dtype)
    logprobs, _, right = _logprobs(make_plan(hidden, head, kernel, chunk), hidden, kernel, head.bias, targets)
    return logprobs, right


def _parts(head: Any, dtype: Any) -> tuple[jax.Array, jax.Array | None]:
    """`(kernel, rows)`: the kernel with new rows in their places, through which no gradient goes, and those rows."""
    rows = getattr(head, 'rows', None)
    if rows is None:
        return head.kernel, None
    fixed = lax.stop_gradient(rows if head.vocab_major else rows.T)
    return put_rows(head.kernel.astype(dtype), fixed, head.ids, 0 if head.vocab_major else 1), rows


def _readied(
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


def _logits(plan: Plan, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
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


def _local_targets(plan: Plan, targets: jax.Array, kernel: jax.Array) -> jax.Array:
    """Target ids counted from this device's first token of the vocabulary; those elsewhere fall outside."""
    return targets - lax.axis_index(plan.vocab_axes) * vocab_of(plan, kernel) if plan.vocab_axes else targets


def _score(plan: Plan, logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
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


def _logit_gradient(
    plan: Plan, logits: jax.Array, probabilities: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradient of `sum(weights * nll)` in the product of hidden and kernel, and in the bias's place."""
    onehot = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    grad = (probabilities - onehot) * weights[:, None]
    if plan.softcap is not None:
        grad = grad * (1.0 - jnp.square(logits / plan.softcap))
    return grad * plan.scale if plan.scale != 1.0 else grad, grad


def _pull(
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
        places = _local_targets(plan, jnp.asarray(plan.ids, jnp.int32), kernel)
        places = jnp.where(places < 0, 2**30, places)  # a negative one would count from the end
        own = jnp.take(product, places, axis=1, mode='fill', fill_value=0)
        d_rows += lax.dot_general(own, hidden, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return d_hidden, (d_kernel, d_bias, d_rows)


def _zeros(
    plan: Plan, kernel: jax.Array, bias: jax.Array | None, wanted: Sequence[bool]
) -> tuple[jax.Array | None, ...]:
    d_kernel = jnp.zeros(kernel.shape, jnp.float32) if wanted[1] else None
    d_bias = None if bias is None or not wanted[2] else jnp.zeros(bias.shape, jnp.float32)
    width = kernel.shape[1 if plan.vocab_major else 0]
    return d_kernel, d_bias, jnp.zeros((len(plan.ids), width), jnp.float32) if wanted[3] else None


def _collect(
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


def _loss_and_gradients(
    plan: Plan,
    wanted: Sequence[bool],
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[Any, ...]:
    """`(loss, correct, nll [batch, length], gradients of hidden, kernel, bias, rows)`; None for one not wanted."""

    def device(
        hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, targets: jax.Array, weights: jax.Array
    ) -> tuple[Any, ...]:
        kernel, across, bias = _readied(plan, hidden.dtype, kernel, bias)

        def step(carry: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            loss, correct, sums = carry
            hidden, targets, weights = gathered(plan, *chunk)
            targets = _local_targets(plan, targets, kernel)
            logits = _logits(plan, hidden, across, bias)
            largest, exps, total, picked = _score(plan, logits, targets)
            nll = (jnp.log(total) + largest - picked)[:, 0]
            right = (picked >= largest)[:, 0]
            d_hidden = None
            if any(wanted):
                grad = _logit_gradient(plan, logits, exps / total, targets, weights)
                d_hidden, sums = _pull(plan, grad, hidden, kernel, sums, wanted)
            weights, nll, right = (own(plan, x) for x in (weights, nll, right))
            return (loss + (weights * nll).sum(), correct + (weights * right).sum(), sums), (nll, d_hidden)

        zero = jnp.zeros((), jnp.float32)
        carry = (zero, zero, _zeros(plan, kernel, bias, wanted))
        (loss, correct, sums), (nll, d_hidden) = lax.scan(step, carry, chunks(plan, hidden, targets, weights))
        if plan.token_axes:
            loss, correct = lax.psum((loss, correct), plan.token_axes)
        shape = hidden.shape[:2]
        return loss, correct, uncut(nll, *shape), _collect(plan, d_hidden, sums, shape, wanted)

    specs = specs_of(plan, bias)
    hidden_spec, _, bias_spec, token_spec = specs
    gradient_specs = (hidden_spec, plan.gradient_spec, bias_spec, P())
    gradient_specs = tuple(spec if want else None for spec, want in zip(gradient_specs, wanted, strict=True))
    out_specs = (P(), P(), token_spec, gradient_specs)
    function = per_device(plan, device, (*specs, token_spec), out_specs)
    return function(hidden, kernel, bias, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    plan: Plan,
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    rows: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return _loss_and_gradients(plan, (False,) * 4, hidden, kernel, bias, targets, weights)[:2]


def _cross_entropy_forward(plan: Plan, *inputs: Any) -> tuple[Any, Any]:
    hidden, kernel, bias, _, targets, weights = inputs
    wanted = tuple(x is not None and x.perturbed for x in inputs[:4])
    arrays: list[Any] = [None if x is None else x.value for x in (hidden, kernel, bias, targets, weights)]
    loss, correct, nll, gradients = _loss_and_gradients(plan, wanted, *arrays)
    gradients = tuple(
        None if gradient is None else gradient.astype(x.value.dtype)
        for gradient, x in zip(gradients, inputs[:4], strict=True)
    )
    return (loss, correct), (gradients, nll if weights.perturbed else None)


def _cross_entropy_backward(plan: Plan, residuals: Any, cotangents: Any) -> tuple[jax.Array | None, ...]:
    gradients, nll = residuals
    scale = cotangents[0]
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        return (None,) * 6
    gradients = [None if gradient is None else gradient * scale.astype(gradient.dtype) for gradient in gradients]
    return (*gradients, None, None if nll is None else nll * scale)


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward, symbolic_zeros=True)


def _logprobs(
    plan: Plan, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(log-probability, logsumexp, whether the target's logit is the largest)`, each `[batch, length]`."""

    def device(hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, targets: jax.Array) -> tuple[Any, ...]:
        kernel, across, bias = _readied(plan, hidden.dtype, kernel, bias)

        def step(_: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            hidden, targets = gathered(plan, *chunk)
            targets = _local_targets(plan, targets, kernel)
            largest, _, total, picked = _score(plan, _logits(plan, hidden, across, bias), targets)
            lse = jnp.log(total) + largest
            values = (picked - lse)[:, 0], lse[:, 0], (picked >= largest)[:, 0]
            return None, tuple(own(plan, x) for x in values)

        _, values = lax.scan(step, None, chunks(plan, hidden, targets))
        return tuple(uncut(x, *hidden.shape[:2]) for x in values)

    specs = specs_of(plan, bias)
    return per_device(plan, device, specs, (specs[-1],) * 3)(hidden, kernel, bias, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(
    plan: Plan,
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    rows: jax.Array | None,
    targets: jax.Array,
) -> jax.Array:
    return _logprobs(plan, hidden, kernel, bias, targets)[0]


def _token_logprobs_forward(plan: Plan, *inputs: Any) -> tuple[Any, Any]:
    hidden, kernel, bias, rows, targets = inputs
    # `wanted` is told to the backward pass by the structure of the residuals: a bool would be traced.
    wanted = tuple(x is not None and x.perturbed for x in inputs[:4])
    marks = tuple(() if want else None for want in wanted)
    arrays: list[Any] = [None if x is None else x.value for x in (hidden, kernel, bias, targets)]
    logprobs, lse, _ = _logprobs(plan, *arrays)
    return logprobs, (*arrays, rows.value if wanted[3] else None, lse, marks)


def _token_logprobs_backward(plan: Plan, residuals: Any, cotangent: Any) -> tuple[jax.Array | None, ...]:
    hidden, kernel, bias, targets, rows, lse, marks = residuals
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return (None,) * 5
    wanted = tuple(mark is not None for mark in marks)

    def device(
        hidden: jax.Array,
        kernel: jax.Array,
        bias: jax.Array | None,
        targets: jax.Array,
        lse: jax.Array,
        cotangent: jax.Array,
    ) -> tuple[Any, ...]:
        kernel, across, bias = _readied(plan, hidden.dtype, kernel, bias)

        def step(sums: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            hidden, targets, lse, cotangent = gathered(plan, *chunk)
            targets = _local_targets(plan, targets, kernel)
            logits = _logits(plan, hidden, across, bias)
            # Filled-up tokens have lse 0; their cotangent is 0, but exp of their logits must stay finite.
            exps = jnp.exp(jnp.minimum(logits - lse[:, None], 0.0))
            grad = _logit_gradient(plan, logits, exps, targets, -cotangent)
            d_hidden, sums = _pull(plan, grad, hidden, kernel, sums, wanted)
            return sums, d_hidden

        parts = chunks(plan, hidden, targets, lse, cotangent)
        sums, d_hidden = lax.scan(step, _zeros(plan, kernel, bias, wanted), parts)
        return _collect(plan, d_hidden, sums, hidden.shape[:2], wanted)

    specs = specs_of(plan, bias)
    hidden_spec, _, bias_spec, token_spec = specs
    out_specs = (hidden_spec, plan.gradient_spec, bias_spec, P())
    out_specs = tuple(spec if want else None for spec, want in zip(out_specs, wanted, strict=True))
    function = per_device(plan, device, (*specs, token_spec, token_spec), out_specs)
    gradients = function(hidden, kernel, bias, targets, lse, cotangent)
    gradients = (
        None if gradient is None else gradient.astype(x.dtype)
        for gradient, x in zip(gradients, (hidden, kernel, bias, rows), strict=True)
    )
    return (*gradients, None)


_token_logprobs.defvjp(_token_logprobs_forward, _token_logprobs_backward, symbolic_zeros=True)
