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
from jaxtune.parallel import axis_size
from jaxtune.rl import Algorithm, Sums
from jaxtune.rl.layout import scored_count


def batch_spec(seq_len: int, scored: int, token_fields: Sequence[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds: what `RolloutPacker.fields` makes, and further numbers for each token."""
    fields = dict.fromkeys(('tokens', 'positions', 'segment_ids'), np.int32)
    fields |= dict.fromkeys(('loss_mask', 'shares', *token_fields), np.float32)
    spec = {name: jax.ShapeDtypeStruct((seq_len,), dtype) for name, dtype in fields.items()}
    return spec | {'places': jax.ShapeDtypeStruct((scored,), np.int32)}


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
    scored = _scored(model, params, batch, rng)
    return scored.logps(tempered(model.head(params), temperature)), scored.values(params)


def per_token_values(model: Model, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The value head's outputs alone, as `per_token_logps` has them."""
    return _scored(model, params, batch, None).values(params)


@jax.custom_vjp
def _moved(x: jax.Array, to: jax.Array, back: jax.Array) -> jax.Array:
    """What of each row is at some places, 0 for one beyond its end; a gather in both directions, never a scattered sum.

    Args:
      x: `[rows, length, ...]`.
      to: `[rows, count]` int32, places of `x`, each at most once.
      back: `[rows, length]` int32, the other way round: where in `to` each place is, or `count`.
    """
    return jax.vmap(lambda row, at: row.at[at].get(mode='fill', fill_value=0))(x, to)


def _moved_forward(x: jax.Array, to: jax.Array, back: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _moved(x, to, back), (to, back)


def _moved_backward(places: tuple[jax.Array, jax.Array], d_moved: jax.Array) -> tuple[jax.Array, None, None]:
    to, back = places
    return _moved(d_moved, back, to), None, None


_moved.defvjp(_moved_forward, _moved_backward)


@dataclasses.dataclass(frozen=True)
class _Scored:
    """The places of rows that are scored: only they go through the vocabulary and the value head.

    Attributes:
      hidden: `[rows, scored, d_model]`, at these places.
      targets: `[rows, scored]` int32, the tokens after them.
      places: where they lie, `[rows, scored]`, and each place's number among them, as `_moved` has both; None: all are.
      mask: `[rows, length]`.
    """

    hidden: jax.Array
    targets: jax.Array
    places: tuple[jax.Array, jax.Array] | None
    mask: jax.Array

    def logps(self, head: Head) -> jax.Array:
        return self._in_rows(token_logprobs(self.hidden, head, self.targets))

    def entropies(self, head: Head) -> jax.Array:
        return self._in_rows(token_entropies(self.hidden, head))

    def values(self, params: Any) -> jax.Array:
        if value_head.NAME not in params:
            return jnp.zeros_like(self.mask)
        return self._in_rows(value_head.values(params, self.hidden))

    def _in_rows(self, numbers: jax.Array) -> jax.Array:
        """Numbers of the scored places as `[rows, length]`."""
        if self.places is not None:
            to, back = self.places
            numbers = _moved(numbers, back, to)
        return numbers * self.mask


def _scored(model: Model, params: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None) -> _Scored:
    """The forward pass, and of its hidden states those from which something is predicted."""
    inputs = {name: batch[name] for name in ('tokens', 'positions', 'segment_ids')}
    hidden = model.apply(value_head.policy(params), inputs, rng=rng).hidden
    targets, to, mask = jnp.roll(batch['tokens'], -1, axis=1), batch.get('places'), batch['loss_mask']
    if to is None or to.shape[1] == hidden.shape[1]:
        return _Scored(hidden, targets, None, mask)
    here = mask != 0
    places = to, jnp.where(here, jnp.cumsum(here, axis=1, dtype=jnp.int32) - 1, to.shape[1])
    return _Scored(_moved(hidden, *places), _moved(targets, *places), places, mask)


@dataclasses.dataclass(frozen=True)
class BoundAlgorithm:
    """An algorithm with the settings of a recipe, as what an update learns.

    Attributes:
      algorithm: the algorithm.
      settings: the recipe's `rl` subtree.
      seq_len: length of a row.
      temperature: that answers are drawn at.
      longest: tokens of an answer at most.
      one_update: a step is one update of all its answers. The policy that wrote them is then the one that learns, and
        the log-probabilities of both are those of the update's own forward pass.
    """

    algorithm: Algorithm
    settings: Settings
    seq_len: int
    temperature: float
    longest: int
    one_update: bool = False

    @property
    def group(self) -> int:
        """How many answers each prompt gets."""
        return self.algorithm.group(self.settings)

    def batch_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What one row of a batch holds, of answers that each need a row."""
        scored = scored_count(self.seq_len, min(self.longest, self.seq_len), axis_size('sequence'))
        return batch_spec(self.seq_len, scored, self.algorithm.token_fields)

    def loss(self, model: Model, params: Any, batch: Mapping[str, jax.Array], rng: jax.Array | None) -> Sums:
        """The summed loss of a batch."""
        scored, head = _scored(model, params, batch, rng), tempered(model.head(params), self.temperature)
        logps, values = scored.logps(head), scored.values(params)
        if self.one_update:
            batch = {**batch, 'old': jax.lax.stop_gradient(logps)}
        if self.settings.entropy_coef:
            batch = {**batch, 'entropies': scored.entropies(head)}
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
