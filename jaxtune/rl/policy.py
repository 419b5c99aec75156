"""What the algorithms share: rows of prompts and answers, and the log-probabilities of these."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxtune.models import Model, value_head
from jaxtune.models.model import Head
from jaxtune.objectives.cross_entropy import token_logprobs


class Found(NamedTuple):
    """A batch of answers, and what the policy that wrote them, the reference and the reward say of them.

    Attributes:
      old: `[answers, width]` float32, the policy's log-probability of each token of an answer; 0 after its end.
      reference: the reference's.
      values: the value head's before each token was written; 0 without a head.
      weights: 1 where the answer has a token, else 0.
      scores: `[answers]` float32, the reward of each.
    """

    old: jax.Array
    reference: jax.Array
    values: jax.Array
    weights: jax.Array
    scores: jax.Array


def make_row(config: ConfigDict, *tokenwise: str) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds: what `packed.Packed.fields` makes, and further numbers for each token."""
    fields = dict.fromkeys(('tokens', 'positions', 'segment_ids'), np.int32)
    fields |= dict.fromkeys(('weights', 'shares', *tokenwise), np.float32)
    return {name: jax.ShapeDtypeStruct((config.data.seq_len,), dtype) for name, dtype in fields.items()}


def read(
    config: ConfigDict, model: Model, params: Any, batch: dict[str, jax.Array], rng: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The training forward pass over rows of prompts and answers.

    Args:
      config: the recipe.
      model: the policy's.
      params: its parameters, a value head maybe among them.
      batch: as `make_row` says.
      rng: for dropout of added weights.

    Returns:
      `(logprobs, values)`, each `[rows, length]` float32, at the place before each token and 0 outside the answers.
    """
    inputs = {name: batch[name] for name in ('tokens', 'positions', 'segment_ids')}
    weights = batch['weights']
    hidden = model.apply(value_head.policy(params), inputs, rng=rng).hidden
    head = tempered(model.head(params), config.generate.temperature)
    found = token_logprobs(hidden, head, jnp.roll(batch['tokens'], -1, axis=1)) * weights
    values = value_head.values(params, hidden) * weights if value_head.NAME in params else jnp.zeros_like(weights)
    return found, values


def tempered(head: Head, temperature: float) -> Head:
    """The head whose logits are divided by the temperature that answers are drawn at (only without a softcap)."""
    if temperature == 1.0:
        return head
    bias = None if head.bias is None else head.bias / temperature
    return dataclasses.replace(head, scale=(head.scale or 1.0) / temperature, bias=bias)


def ratio_losses(settings: ConfigDict, logprobs, old, advantages, weights) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped surrogate of each token (Schulman et al. 2017, arXiv:1707.06347, equation 7), to be made small.

    Args:
      settings: the recipe's `rl`.
      logprobs, old: log-probabilities now, and when the answer was written.
      advantages: how much better than expected the token was.
      weights: 0 where there is no token.

    Returns:
      Losses, and `clip_fraction` and `approx_kl` of each token; shapes as given.
    """
    difference = (logprobs - old) * weights
    ratio = jnp.exp(difference)
    free = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - settings.clip, 1.0 + settings.clip)
    metrics = {
        'clip_fraction': (clipped > free).astype(jnp.float32),
        'approx_kl': ratio - 1.0 - difference,  # of the old policy from the new one (Schulman 2020, "k3")
    }
    return jnp.maximum(free, clipped), metrics


def divergence(reference: jax.Array, logprobs: jax.Array) -> jax.Array:
    """An estimate of each token's divergence from the reference that is never below 0, unbiased, and has a gradient.

    `r - 1 - log r` with `r` the reference's probability over the policy's (Schulman 2020; GRPO's equation 4).
    """
    difference = reference - logprobs
    return jnp.exp(difference) - 1.0 - difference
