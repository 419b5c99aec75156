"""Scores of whole answers at evaluation: the share that greedy decoding would write to the last token.

Greedy decoding repeats an answer exactly if, given each beginning of it, the next token is the likeliest; so one pass
over the answers themselves tells it, with nothing generated.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.objectives.cross_entropy import cross_entropy, token_scores


def score(
    hidden: jax.Array,
    head: Any,
    targets: jax.Array,
    weights: jax.Array,
    segment_ids: jax.Array,
    rng: jax.Array | None,
    more: Callable[[jax.Array], dict[str, Any]] = lambda logprobs: {},
) -> tuple[jax.Array, dict[str, Any]]:
    """Summed negative log-likelihood of the scored targets in nats, and the sums that `summarise` makes metrics of.

    Args:
      hidden: `[batch, length, d_model]`, after the final norm.
      head: as for `cross_entropy`.
      targets: `[batch, length]` int32; any value where the weight is 0.
      weights: `[batch, length]`, 1 where a target is scored, else 0.
      segment_ids: `[batch, length]` int32: one answer, or the answers of one conversation; 0 = padding.
      rng: None at evaluation, which alone looks at whole answers.
      more: further sums of an evaluation, of the targets' log-probabilities `[batch, length]`.
    """
    if rng is not None:
        nll, correct = cross_entropy(hidden, head, targets, weights)
        return nll, {'accuracy': correct}
    logprobs, right = token_scores(hidden, head, jnp.where(weights > 0, targets, 0))
    answers, exact = jax.vmap(_count)(segment_ids, weights > 0, right)
    sums = {'accuracy': (weights * right).sum(), 'answers': answers.sum(), 'exact_match': exact.sum()}
    return -(weights * logprobs).sum(), sums | more(logprobs)


def _count(segment_ids: jax.Array, scored: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of a row: segments with a scored target, and those of them in which all are right."""
    size = segment_ids.shape[0] + 1
    some = jnp.zeros(size, bool).at[segment_ids].max(scored)
    wrong = jnp.zeros(size, bool).at[segment_ids].max(scored & ~right)
    return some.sum().astype(jnp.float32), (some & ~wrong).sum().astype(jnp.float32)


def summarise(sums: dict[str, float], count: float) -> dict[str, float]:
    """Metrics of an evaluation's sums: shares of the tokens, and of the answers."""
    answers = max(sums['answers'], 1.0)
    return {'accuracy': sums['accuracy'] / count, 'exact_match': sums['exact_match'] / answers}
