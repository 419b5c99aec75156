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
from jaxtune.objectives.entropy import token_entropies
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
    hidden, head = _hidden(model, params, batch, temperature, rng)
    return _logps_and_values(params, batch, hidden, head)


def _hidden(
    model: Model, params: Any, batch: Mapping[str, jax.Array], temperature: float, rng: jax.Array | None
) -> tuple[jax.Array, Head]:
    inputs = {name: batch[name] for name in ('tokens', 'positions', 'segment_ids')}
    hidden = model.apply(value_head.policy(params), inputs, rng=rng).hidden
    return hidden, tempered(model.head(params), temperature)


def _logps_and_values(
    params: Any, batch: Mapping[str, jax.Array], hidden: jax.Array, head: Head
) -> tuple[jax.Array, jax.Array]:
    mask = batch['loss_mask']
    logps = token_logprobs(hidden, head, jnp.roll(batch['tokens'], -1, axis=1)) * mask
    values = value_head.values(params, hidden) * mask if value_head.NAME in params else jnp.zeros_like(mask)
    return logps, values


def _with_entropies(
    model: Model, params: Any, batch: Mapping[str, jax.Array], temperature: float, rng: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`per_token_logps`, and the entropy in nats of what each token was drawn from, `[rows, length]`."""
    hidden, head = _hidden(model, params, batch, temperature, rng)
    logps, values = _logps_and_values(params, batch, hidden, head)
    return logps, values, token_entropies(hidden, head) * batch['loss_mask']


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
        if not self.settings.entropy_coef:
            logps, values = per_token_logps(model, params, batch, self.temperature, rng)
            return self.algorithm.loss(self.settings, logps, values, batch)
        logps, values, entropies = _with_entropies(model, params, batch, self.temperature, rng)
        return self.algorithm.loss(self.settings, logps, values, {**batch, 'entropies': entropies})

    def statistics(self, model: Model) -> None:
        """Nothing of the whole batch is needed before the loss."""
        return None


def tempered(head: Head, temperature: float) -> Head:
    """The head whose logits are divided by the temperature that answers are drawn at (only without a softcap)."""
    if temperature == 1.0:
        return head
    bias = None if head.bias is None else head.bias / temperature
    return dataclasses.replace(head, scale=(head.scale or 1.0) / temperature, bias=bias)
