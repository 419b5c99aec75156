"""How much better than expected a token or an answer was.

| `rl.advantage` | an answer is measured by | source |
|---|---|---|
| `gae` | what a value head predicted, token by token; whitened over the step | Schulman et al. 2015, arXiv:1506.02438 |
| `group` | the mean of its group, over the standard deviation | GRPO, Shao et al. 2024, arXiv:2402.03300 |
| `group_mean` | the mean of its group | Dr. GRPO, Liu et al. 2025, arXiv:2503.20783 |
| `leave_one_out` | the mean of the others of its group | RLOO, Ahmadian et al. 2024, arXiv:2402.14740 |
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.common.settings import Settings
from jaxtune.rl import RolloutBatch
from jaxtune.rl.choices import Choices
from jaxtune.rl.losses import divergence

Fields = dict[str, jax.Array]


def compute_advantages(chosen: Choices, settings: Settings, rollouts: RolloutBatch) -> tuple[Fields, Fields]:
    """Advantages, and what else of each token the loss reads; with metrics.

    Args:
      chosen: which algorithm of the family.
      settings: the recipe's `rl`.
      rollouts: the answers of a step; those to one prompt follow each other.

    Returns:
      `(fields, metrics)`: fields `[answers, width]` named by `Choices.token_fields`.
    """
    by = _by_group if chosen.grouped else _by_values
    fields, metrics = by(chosen, settings, rollouts)
    known = {'old': rollouts.old, 'reference': rollouts.reference, 'values': rollouts.values, **fields}
    if chosen.normalise == 'constant':
        known['constant'] = rollouts.mask / rollouts.mask.shape[1]
    return {name: known[name] for name in chosen.token_fields}, metrics


def _by_values(chosen: Choices, settings: Settings, rollouts: RolloutBatch) -> tuple[Fields, Fields]:
    """Advantages, whitened over all tokens, and returns; with how well the value head predicted these."""
    mask = rollouts.mask
    last = mask * (1.0 - jnp.pad(mask[:, 1:], ((0, 0), (0, 1))))
    rewards = last * rollouts.scores[:, None]
    if chosen.kl_in == 'reward':
        rewards = -settings.kl_coef * divergence(chosen.kl, rollouts.reference, rollouts.old) + rewards
    gains = gae(rewards, rollouts.values, mask, settings.gamma, settings.gae_lambda)
    returns = (gains + rollouts.values) * mask
    explained = 1.0 - _variance(returns - rollouts.values, mask) / jnp.maximum(_variance(returns, mask), 1e-8)
    metrics = {'explained_variance': explained, 'value': (rollouts.values * mask).sum() / mask.sum()}
    return {'advantages': whiten(gains, mask), 'returns': returns}, metrics


def _by_group(chosen: Choices, settings: Settings, rollouts: RolloutBatch) -> tuple[Fields, Fields]:
    """Every token has the advantage of its answer; with the share of groups that have nothing to tell apart."""
    scores = rollouts.scores.reshape(-1, settings.group)
    zero_std = (scores.max(-1) == scores.min(-1)).astype(jnp.float32).mean()
    if chosen.kl_in == 'reward':
        away = divergence(chosen.kl, rollouts.reference, rollouts.old) * rollouts.mask
        scores = scores - settings.kl_coef * away.sum(-1).reshape(scores.shape)
    measured = {'group': group_normalised, 'group_mean': above_mean, 'leave_one_out': leave_one_out}
    advantages = measured[chosen.advantage](scores).reshape(-1, 1) * rollouts.mask
    return {'advantages': advantages}, {'frac_reward_zero_std': zero_std}


def group_normalised(scores: jax.Array) -> jax.Array:
    """Scores `[groups, answers]` less their group's mean, over its sample standard deviation plus 1e-4.

    They are 0 where all of a group are the same: the mean of equal numbers is rounded, and what is left of them would
    pass for a difference.
    """
    std = jnp.std(scores, axis=-1, keepdims=True, ddof=1)
    return jnp.where(_same(scores), 0.0, (scores - scores.mean(-1, keepdims=True)) / (std + 1e-4))


def above_mean(scores: jax.Array) -> jax.Array:
    """Scores `[groups, answers]` less their group's mean; 0 where all of a group are the same."""
    return jnp.where(_same(scores), 0.0, scores - scores.mean(-1, keepdims=True))


def leave_one_out(scores: jax.Array) -> jax.Array:
    """Scores `[groups, answers]` less the mean of the others of their group; 0 where all of a group are the same."""
    others = (scores.sum(-1, keepdims=True) - scores) / (scores.shape[-1] - 1)
    return jnp.where(_same(scores), 0.0, scores - others)


def _same(scores: jax.Array) -> jax.Array:
    return scores.max(-1, keepdims=True) == scores.min(-1, keepdims=True)


def gae(rewards: jax.Array, values: jax.Array, weights: jax.Array, gamma: float, decay: float) -> jax.Array:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438), `[answers, width]`.

    Args:
      rewards: `[answers, width]`, what came after each token.
      values: `[answers, width]`, what was expected before it.
      weights: `[answers, width]`, 1 for the tokens of an answer; the value after them is 0.
      gamma: discount.
      decay: lambda.
    """

    def back(after: tuple[jax.Array, jax.Array], here: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        gain, value_after = after
        reward, value, weight = here
        gain = (reward + gamma * value_after - value + gamma * decay * gain) * weight
        return (gain, value * weight), gain

    zero = jnp.zeros(rewards.shape[0], jnp.float32)
    columns = (rewards.T, values.T, weights.T)
    return lax.scan(back, (zero, zero), columns, reverse=True)[1].T


def _variance(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Unbiased, of the values with weight 1."""
    count = weights.sum()
    mean = (x * weights).sum() / count
    return (jnp.square(x - mean) * weights).sum() / jnp.maximum(count - 1.0, 1.0)


def whiten(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 over the values with weight 1; 0 elsewhere, and where they differ by rounding alone."""
    mean = (x * weights).sum() / weights.sum()
    variance = _variance(x, weights)
    rounding = 8 * jnp.finfo(x.dtype).eps * jnp.abs(x * weights).max()
    return jnp.where(variance > jnp.square(rounding), (x - mean) * lax.rsqrt(variance + 1e-8) * weights, 0.0)
