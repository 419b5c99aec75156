"""Divergence of a student's next-token distributions from a teacher's, without ever holding all logits of either.

The generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2023, arXiv:2306.13649), with `p` the student's
distribution and `q` the teacher's, both of logits divided by the temperature, and `m = (1 - beta) p + beta q`:

| `beta` | divergence |
|---|---|
| 0 | `KL(q, p)`, forward: the student covers what the teacher may say (Hinton et al. 2015, arXiv:1503.02531) |
| between | `beta KL(q, m) + (1 - beta) KL(p, m)` |
| 1 | `KL(p, q)`, reverse: the student says nothing that the teacher would not |

As in TRL there is no factor of the squared temperature. Both projections run together over chunks of tokens, with the
gradient made in the same pass, as in `cross_entropy`, whose own term is mixed in there: the student's logits are
computed once. No gradient goes to the teacher.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    vocab_of,
)
from jaxtune.parallel import one_cpu

_FLOOR = -1e30  # logit of what has no probability: differences of its logarithms stay finite


class Distilled(NamedTuple):
    """Weighted sums over the tokens of a batch, float32 scalars.

    Attributes:
      loss: `(1 - share) * nll + share * divergence`.
      nll: of the targets, in nats.
      divergence: in nats.
      correct: number of targets whose logit is the largest.
    """

    loss: jax.Array
    nll: jax.Array
    divergence: jax.Array
    correct: jax.Array


@dataclasses.dataclass(frozen=True)
class _Terms:
    """What is fixed when the loss is traced.

    Attributes:
      plan: of the student's vocabulary.
      teacher: of the teacher's, divided in the same way.
      beta: see the module.
      temperature: both sides' logits are divided by it in the divergence.
      share: of the divergence in the loss.
      common: tokens that both sides have a row for, the first ones.
    """

    plan: Plan
    teacher: Plan
    beta: float
    temperature: float
    share: float
    common: int


@jax.named_scope('vocabulary')
def distillation(
    hidden: jax.Array,
    head: Any,
    teacher_hidden: jax.Array,
    teacher_head: Any,
    targets: jax.Array,
    weights: jax.Array,
    *,
    beta: float,
    temperature: float = 1.0,
    share: float = 1.0,
    chunk: int | None = None,
) -> Distilled:
    """Cross-entropy and divergence from a teacher.

    Where one side has more rows than the other, tokens that both have are compared, the first ones; the cross-entropy
    is over all of the student's.

    Args:
      hidden: the student's `[batch, length, d_model]`, after the final norm.
      head: as for `cross_entropy`.
      teacher_hidden: the teacher's `[batch, length, its d_model]`.
      teacher_head: the teacher's.
      targets: `[batch, length]` int32; any value where the weight is 0.
      weights: `[batch, length]` float32.
      beta: 0 forward KL, 1 reverse KL, between: generalised Jensen-Shannon divergence.
      temperature: both sides' logits are divided by it in the divergence.
      share: of the divergence in the loss, 0 to 1.
      chunk: as for `cross_entropy`.

    Returns:
      The sums; `loss` is differentiable in the student's `hidden`, `kernel`, `bias` and `rows`.
    """
    kernel, rows = projection.kernel_and_rows(head, hidden.dtype)
    plan = make_plan(hidden, head, kernel, chunk)
    vocab = vocab_of(head, kernel)
    theirs, _ = projection.kernel_and_rows(teacher_head, teacher_hidden.dtype)
    common = min(vocab, vocab_of(teacher_head, theirs))
    theirs = _resized(theirs, vocab, 0 if teacher_head.vocab_major else 1)
    their_bias = None if teacher_head.bias is None else _resized(teacher_head.bias, vocab, 0)
    padding = 0 if teacher_head.softcap else plan.padding
    plan = dataclasses.replace(plan, padding=padding)
    teacher = dataclasses.replace(
        plan,
        vocab_major=bool(teacher_head.vocab_major),
        scale=1.0 if teacher_head.scale is None else float(teacher_head.scale),
        softcap=float(teacher_head.softcap) if teacher_head.softcap else None,
        across=bool(teacher_head.vocab_major) and one_cpu(),
        scatter_axes=(),
        ids=(),
    )
    terms = _Terms(plan, teacher, float(beta), float(temperature), float(share), common)
    frozen = lax.stop_gradient((teacher_hidden, theirs, their_bias))
    targets = jnp.clip(targets, 0, vocab - 1)
    weights = weights.astype(jnp.float32)
    sums: Any = _distil(terms, hidden, kernel, head.bias, rows, frozen, targets, weights)
    return Distilled(*sums)


def _resized(x: jax.Array, size: int, axis: int) -> jax.Array:
    """An array cut, or filled up with zeros, to a size along an axis."""
    if x.shape[axis] >= size:
        return lax.slice_in_dim(x, 0, size, axis=axis)
    return jnp.pad(x, [(0, size - x.shape[axis] if number == axis else 0) for number in range(x.ndim)])


def _total(plan: Plan, x: jax.Array) -> jax.Array:
    """Sums over the whole vocabulary, `[tokens, 1]`."""
    total = x.sum(-1, keepdims=True)
    return lax.psum(total, plan.vocab_axes) if plan.vocab_axes else total


def _log_probabilities(terms: _Terms, logits: jax.Array) -> jax.Array:
    """Of this device's part of the vocabulary; of tokens that only one side has, and of padding, about `_FLOOR`."""
    plan, vocab = terms.plan, logits.shape[-1]
    logits = jnp.maximum(logits / terms.temperature, _FLOOR)
    first = lax.axis_index(plan.vocab_axes) * (vocab - plan.padding) if plan.vocab_axes else 0
    if terms.common < _vocab_everywhere(plan, vocab):
        logits = jnp.where(first + lax.broadcasted_iota(jnp.int32, (1, vocab), 1) < terms.common, logits, _FLOOR)
    largest = logits.max(-1, keepdims=True)
    if plan.vocab_axes:
        largest = lax.pmax(largest, plan.vocab_axes)
    logits = logits - largest
    return logits - jnp.log(_total(plan, jnp.exp(logits)))


def _vocab_everywhere(plan: Plan, vocab: int) -> int:
    """Tokens of the whole vocabulary, of which a device has so many with the padding."""
    return (vocab - plan.padding) * (lax.axis_size(plan.vocab_axes) if plan.vocab_axes else 1)


def _divergence(terms: _Terms, student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(divergence [tokens, 1], its gradient in the student's logits)` of logits `[tokens, vocab on this device]`."""
    beta, total = terms.beta, functools.partial(_total, terms.plan)
    log_p, log_q = _log_probabilities(terms, student), _log_probabilities(terms, teacher)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if beta == 0:
        value, grad = total(q * (log_q - log_p)), p - q
    elif beta == 1:
        ratio = log_p - log_q
        value = total(p * ratio)
        grad = p * (ratio - value)
    else:
        log_m = jnp.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
        ratio = log_p - log_m
        own_kl = total(p * ratio)
        value = beta * total(q * (log_q - log_m)) + (1 - beta) * own_kl
        grad = (1 - beta) * p * (ratio - own_kl)
    return value, grad / terms.temperature


def _sums_and_gradients(
    terms: _Terms,
    wanted: Sequence[bool],
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    frozen: tuple[jax.Array, jax.Array, jax.Array | None],
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[Any, Any]:
    """`(sums of Distilled, gradients of hidden, kernel, bias, rows)`; None for one not wanted."""
    plan, share = terms.plan, terms.share

    def device(
        hidden: jax.Array,
        kernel: jax.Array,
        bias: jax.Array | None,
        frozen: tuple[jax.Array, jax.Array, jax.Array | None],
        targets: jax.Array,
        weights: jax.Array,
    ) -> tuple[Any, Any]:
        kernel, across, bias = projection.readied(plan, hidden.dtype, kernel, bias)
        their_hidden, theirs, their_bias = frozen
        _, theirs, their_bias = projection.readied(terms.teacher, their_hidden.dtype, theirs, their_bias)

        def step(carry: Any, chunk: tuple[jax.Array, ...]) -> tuple[Any, Any]:
            totals, sums = carry
            hidden, their_hidden, targets, weights = gathered(plan, *chunk)
            targets = projection.local_targets(plan, targets, kernel)
            logits = projection.logits_of(plan, hidden, across, bias)
            largest, exps, total, picked = projection.score(plan, logits, targets)
            divergence, pull = _divergence(
                terms, logits, projection.logits_of(terms.teacher, their_hidden, theirs, their_bias)
            )
            d_hidden = None
            if any(wanted):
                grad = pull * (share * weights[:, None])
                own_grad = projection.logit_gradient(plan, logits, exps / total, targets, (1 - share) * weights)
                d_hidden, sums = projection.pull(
                    plan, _through(plan, logits, grad, own_grad), hidden, kernel, sums, wanted
                )
            nll = jnp.log(total) + largest - picked
            values = (own(plan, weights * x[:, 0]).sum() for x in (nll, divergence, picked >= largest))
            return (tuple(a + b for a, b in zip(totals, values, strict=True)), sums), d_hidden

        zero = jnp.zeros((), jnp.float32)
        carry = ((zero,) * 3, projection.zeros(plan, kernel, bias, wanted))
        (totals, sums), d_hidden = lax.scan(step, carry, chunks(plan, hidden, their_hidden, targets, weights))
        if plan.token_axes:
            totals = lax.psum(totals, plan.token_axes)
        nll, divergence, correct = totals
        loss = (1 - share) * nll + share * divergence
        return (loss, nll, divergence, correct), projection.collect(plan, d_hidden, sums, hidden.shape[:2], wanted)

    hidden_spec, kernel_spec, bias_spec, token_spec = specs_of(plan, bias)
    gradient_specs = (hidden_spec, plan.gradient_spec, bias_spec, P())
    gradient_specs = tuple(spec if want else None for spec, want in zip(gradient_specs, wanted, strict=True))
    frozen_specs = (hidden_spec, *specs_of(terms.teacher, frozen[2])[1:3])
    in_specs = (hidden_spec, kernel_spec, bias_spec, frozen_specs, token_spec, token_spec)
    function = per_device(plan, device, in_specs, ((P(),) * 4, gradient_specs))
    return function(hidden, kernel, bias, frozen, targets, weights)


def _through(
    plan: Plan, logits: jax.Array, grad: jax.Array, others: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """A gradient in the logits taken back through softcap and scale, added to another that has been."""
    if plan.softcap is not None:
        grad = grad * (1.0 - jnp.square(logits / plan.softcap))
    return others[0] + grad * plan.scale, others[1] + grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _distil(
    terms: _Terms,
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    rows: jax.Array | None,
    frozen: tuple[jax.Array, jax.Array, jax.Array | None],
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, ...]:
    return _sums_and_gradients(terms, (False,) * 4, hidden, kernel, bias, frozen, targets, weights)[0]


def _forward(terms: _Terms, *inputs: Any) -> tuple[Any, Any]:
    wanted = tuple(x is not None and x.perturbed for x in inputs[:4])
    arrays = jax.tree.map(lambda x: x.value, inputs, is_leaf=lambda x: hasattr(x, 'perturbed'))
    hidden, kernel, bias, rows, frozen, targets, weights = arrays
    sums, gradients = _sums_and_gradients(terms, wanted, hidden, kernel, bias, frozen, targets, weights)
    gradients = tuple(
        None if gradient is None else gradient.astype(x.dtype)
        for gradient, x in zip(gradients, (hidden, kernel, bias, rows), strict=True)
    )
    return sums, gradients


def _backward(terms: _Terms, gradients: Any, cotangents: Any) -> tuple[Any, ...]:
    scale, rest = cotangents[0], (None, None, None)
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        return (None,) * 4 + rest
    return *(None if gradient is None else gradient * scale.astype(gradient.dtype) for gradient in gradients), *rest


_distil.defvjp(_forward, _backward, symbolic_zeros=True)
