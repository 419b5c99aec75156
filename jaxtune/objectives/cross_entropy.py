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

from jaxtune.objectives import projection
from jaxtune.objectives.vocabulary import (
    Plan,
    chunks,
    gathered,
    make_plan,
    own,
    per_device,
    specs_of,
    uncut,
    vocab_of,
)


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
    kernel, rows = projection.kernel_and_rows(head, hidden.dtype)
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
    kernel, rows = projection.kernel_and_rows(head, hidden.dtype)
    return _token_logprobs(make_plan(hidden, head, kernel, chunk), hidden, kernel, head.bias, rows, targets)


@jax.named_scope('vocabulary')
def token_scores(
    hidden: jax.Array, head: Any, targets: jax.Array, *, chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every target, and whether its logit is the largest: `[batch, length]` float32 and bool.

    Arguments as for `token_logprobs`. For evaluation: a gradient would hold all logits.
    """
    kernel, _ = projection.kernel_and_rows(head, hidden.dtype)
    logprobs, _, right = _logprobs(make_plan(hidden, head, kernel, chunk), hidden, kernel, head.bias, targets)
    return logprobs, right


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
        kernel, across, bias = projection.readied(plan, hidden.dtype, kernel, bias)

        def step(carry: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            loss, correct, sums = carry
            hidden, targets, weights = gathered(plan, *chunk)
            targets = projection.local_targets(plan, targets, kernel)
            logits = projection.logits_of(plan, hidden, across, bias)
            largest, exps, total, picked = projection.score(plan, logits, targets)
            nll = (jnp.log(total) + largest - picked)[:, 0]
            right = (picked >= largest)[:, 0]
            d_hidden = None
            if any(wanted):
                grad = projection.logit_gradient(plan, logits, exps / total, targets, weights)
                d_hidden, sums = projection.pull(plan, grad, hidden, kernel, sums, wanted)
            weights, nll, right = (own(plan, x) for x in (weights, nll, right))
            return (loss + (weights * nll).sum(), correct + (weights * right).sum(), sums), (nll, d_hidden)

        zero = jnp.zeros((), jnp.float32)
        carry = (zero, zero, projection.zeros(plan, kernel, bias, wanted))
        (loss, correct, sums), (nll, d_hidden) = lax.scan(step, carry, chunks(plan, hidden, targets, weights))
        if plan.token_axes:
            loss, correct = lax.psum((loss, correct), plan.token_axes)
        shape = hidden.shape[:2]
        return loss, correct, uncut(nll, *shape), projection.collect(plan, d_hidden, sums, shape, wanted)

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
        kernel, across, bias = projection.readied(plan, hidden.dtype, kernel, bias)

        def step(_: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            hidden, targets = gathered(plan, *chunk)
            targets = projection.local_targets(plan, targets, kernel)
            largest, _, total, picked = projection.score(
                plan, projection.logits_of(plan, hidden, across, bias), targets
            )
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
        kernel, across, bias = projection.readied(plan, hidden.dtype, kernel, bias)

        def step(sums: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            hidden, targets, lse, cotangent = gathered(plan, *chunk)
            targets = projection.local_targets(plan, targets, kernel)
            logits = projection.logits_of(plan, hidden, across, bias)
            # Filled-up tokens have lse 0; their cotangent is 0, but exp of their logits must stay finite.
            exps = jnp.exp(jnp.minimum(logits - lse[:, None], 0.0))
            grad = projection.logit_gradient(plan, logits, exps, targets, -cotangent)
            d_hidden, sums = projection.pull(plan, grad, hidden, kernel, sums, wanted)
            return sums, d_hidden

        parts = chunks(plan, hidden, targets, lse, cotangent)
        sums, d_hidden = lax.scan(step, projection.zeros(plan, kernel, bias, wanted), parts)
        return projection.collect(plan, d_hidden, sums, hidden.shape[:2], wanted)

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
