"""What the algorithms share: rows of prompts and answers, and the log-probabilities of these."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.common.settings import Settings
from jaxtune.models import Model, value_head
from jaxtune.models.model import Head
from jaxtune.objectives.cross_entropy import token_logprobs
from jaxtune.rl import Algorithm, Sums


def batch_spec(seq_len: int, token_fields: Sequence[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds: what `RolloutPacker.fields` makes, and further numbers for each token."""
    fields = dict.fromkeys(('tokens', 'positions', 'segment_ids'), np.int32)
    fields |= dict.fromkeys(('loss_mask', 'shares', *token_fields), np.float32)
    return {name: jax.ShapeDtypeStruct((seq_len,), dtype) for name, dtype in fields.items()}


def per_token_logps(
    model: Model, params: Any, batch: Mapping[str, jax.Array], temperature: float, rng: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The training forward pass over rows of prompts and answers.

    Args:
      model: the policy's.
      params: its parameters, a value head maybe among them.
      batch: as `batch_spec` says.
      temperature: that answers are drawn at.
      rng: for dropout of added weights.

    Returns:
      `(logps, values)`, each `[rows, length]` float32, at the place before each token and 0 outside the answers.
    """
    inputs = {name: batch[name] for name in ('tokens', 'positions', 'segment_ids')}
    mask = batch['loss_mask']
    hidden = model.apply(value_head.policy(params), inputs, rng=rng).hidden
    head = tempered(model.head(params), temperature)
    logps = token_logprobs(hidden, head, jnp.roll(batch['tokens'], -1, axis=1)) * mask
    values = value_head.values(params, hidden) * mask if value_head.NAME in params else jnp.zeros_like(mask)
    return logps, values


@dataclasses.dataclass(frozen=True)
class BoundAlgorithm:
    """An algorithm with the settings of a recipe, as what an update learns.

    Attributes:
      algorithm: the algorithm.
      settings: the recipe's `rl` subtree.
      seq_len: length of a row.
      temperature: that answers are drawn at.
    """

    algorithm: Algorithm
    settings: Settings
    seq_len: int
    temperature: float

    @property
    def group(self) -> int:
        """How many answers each prompt gets."""
        return self.algorithm.group(self.settings)

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What one row of a batch holds."""
        return batch_spec(self.seq_len, self.algorithm.token_fields)

    def loss(self, model: Model, params: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None) -> Sums:
        """The summed loss of a batch."""
        logps, values = per_token_logps(model, params, batch, self.temperature, rng)
        return self.algorithm.loss(self.settings, logps, values, batch)

    def statistics(self, model: Model) -> None:
        """Nothing of the whole batch is needed before the loss."""
        return None


def tempered(head: Head, temperature: float) -> Head:
    """The head whose logits are divided by the temperature that answers are drawn at (only without a softcap)."""
    if temperature == 1.0:
        return head
    bias = None if head.bias is None else head.bias / temperature
    return dataclasses.replace(head, scale=(head.scale or 1.0) / temperature, bias=bias)


def ratio_losses(
    settings: Settings, logps: jax.Array, old: jax.Array, advantages: jax.Array, mask: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped surrogate of each token (Schulman et al. 2017, arXiv:1707.06347, equation 7), to be made small.

    Args:
      settings: the recipe's `rl`.
      logps: log-probabilities, now.
      old: log-probabilities, when the answer was written.
      advantages: how much better than expected the token was.
      mask: 0 where there is no token.

    Returns:
      Losses, and `clip_fraction` and `approx_kl` of each token; shapes as given.
    """
    difference = (logps - old) * mask
    ratio = jnp.exp(difference)
    free = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, 1.0 - settings.clip, 1.0 + settings.clip)
    metrics = {
        'clip_fraction': (clipped > free).astype(jnp.float32),
        'approx_kl': ratio - 1.0 - difference,  # of the old policy from the new one (Schulman 2020, "k3")
    }
    return jnp.maximum(free, clipped), metrics


def divergence(reference: jax.Array, logps: jax.Array) -> jax.Array:
    """An estimate of each token's divergence from the reference that is never below 0, unbiased, and has a gradient.

    `r - 1 - log r` with `r` the reference's probability over the policy's (Schulman 2020; GRPO's equation 4).
    """
    difference = reference - logps
    return jnp.exp(difference) - 1.0 - difference
