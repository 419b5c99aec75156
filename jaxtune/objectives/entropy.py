"""The entropy of what each token was drawn from, without ever holding all logits; see `cross_entropy`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.objectives import projection
from jaxtune.objectives.vocabulary import Plan, chunks, gathered, make_plan, own, per_device, specs_of, uncut


@jax.named_scope('vocabulary')
def token_entropies(hidden: jax.Array, head: Any, *, chunk: int | None = None) -> jax.Array:
    """Entropy over the vocabulary at every place.

    Args:
      hidden: `[batch, length, d_model]`, after the final norm.
      head: as for `cross_entropy`.
      chunk: as for `cross_entropy`.

    Returns:
      `[batch, length]` float32, in nats. Differentiable in `hidden`, `kernel`, `bias` and `rows`; the backward pass
      computes the logits again, chunk by chunk.
    """
    kernel, rows = projection.kernel_and_rows(head, hidden.dtype)
    return _entropies(make_plan(hidden, head, kernel, chunk), hidden, kernel, head.bias, rows)


def _log_probabilities(plan: Plan, logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(probabilities, their logarithms, entropy [tokens, 1])` of this device's part of the vocabulary."""
    largest = logits.max(-1, keepdims=True)
    if plan.vocab_axes:
        largest = lax.pmax(largest, plan.vocab_axes)
    exps = jnp.exp(logits - largest)
    total = exps.sum(-1, keepdims=True)
    total = lax.psum(total, plan.vocab_axes) if plan.vocab_axes else total
    # What fills up the vocabulary has a logit of minus infinity, and probability 0.
    logs = jnp.where(exps > 0, logits - largest - jnp.log(total), 0.0)
    probabilities = exps / total
    entropy = -(probabilities * logs).sum(-1, keepdims=True)
    return probabilities, logs, lax.psum(entropy, plan.vocab_axes) if plan.vocab_axes else entropy


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _entropies(
    plan: Plan, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, rows: jax.Array | None
) -> jax.Array:
    def device(hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        _, across, bias = projection.readied(plan, hidden.dtype, kernel, bias)

        def step(_: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            (hidden,) = gathered(plan, *chunk)
            return None, own(plan, _log_probabilities(plan, projection.logits_of(plan, hidden, across, bias))[2][:, 0])

        return uncut(lax.scan(step, None, chunks(plan, hidden))[1], *hidden.shape[:2])

    hidden_spec, kernel_spec, bias_spec, token_spec = specs_of(plan, bias)
    return per_device(plan, device, (hidden_spec, kernel_spec, bias_spec), token_spec)(hidden, kernel, bias)


def _forward(plan: Plan, *inputs: Any) -> tuple[Any, Any]:
    hidden, kernel, bias, rows = inputs
    wanted = tuple(x is not None and x.perturbed for x in inputs)
    marks = tuple(() if want else None for want in wanted)  # read off the structure: a bool would be traced
    arrays: list[Any] = [None if x is None else x.value for x in (hidden, kernel, bias)]
    return _entropies(plan, *arrays, None), (*arrays, rows.value if wanted[3] else None, marks)


def _backward(plan: Plan, residuals: Any, cotangent: Any) -> tuple[jax.Array | None, ...]:
    hidden, kernel, bias, rows, marks = residuals
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return (None,) * 4
    wanted = tuple(mark is not None for mark in marks)

    def device(hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, cotangent: jax.Array) -> tuple[Any, ...]:
        kernel, across, bias = projection.readied(plan, hidden.dtype, kernel, bias)

        def step(sums: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            hidden, cotangent = gathered(plan, *chunk)
            logits = projection.logits_of(plan, hidden, across, bias)
            probabilities, logs, entropy = _log_probabilities(plan, logits)
            # d entropy / d logit = -p (log p + entropy)
            grad = -probabilities * (logs + entropy) * cotangent[:, None]
            if plan.softcap is not None:
                grad = grad * (1.0 - jnp.square(logits / plan.softcap))
            d_hidden, sums = projection.pull(plan, (grad * plan.scale, grad), hidden, kernel, sums, wanted)
            return sums, d_hidden

        zeros = projection.zeros(plan, kernel, bias, wanted)
        sums, d_hidden = lax.scan(step, zeros, chunks(plan, hidden, cotangent))
        return projection.collect(plan, d_hidden, sums, hidden.shape[:2], wanted)

    specs = specs_of(plan, bias)
    out_specs = (specs[0], plan.gradient_spec, specs[2], jax.sharding.PartitionSpec())
    out_specs = tuple(spec if want else None for spec, want in zip(out_specs, wanted, strict=True))
    gradients = per_device(plan, device, specs, out_specs)(hidden, kernel, bias, cotangent)
    return tuple(
        None if gradient is None else gradient.astype(x.dtype)
        for gradient, x in zip(gradients, (hidden, kernel, bias, rows), strict=True)
    )


_entropies.defvjp(_forward, _backward, symbolic_zeros=True)
