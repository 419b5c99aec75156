"""Proximal policy optimisation with a value head, as in InstructGPT.

Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155.

Every token costs `rl.kl_coef` times its log-probability above the reference's; the last one brings the reward.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.common.settings import Settings
from jaxtune.rl import Algorithm, RolloutBatch, Sums
from jaxtune.rl.policy import ratio_losses


def compute_advantages(settings: Settings, rollouts: RolloutBatch) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Advantages, whitened over all tokens, and returns; with how well the value head foresaw these."""
    mask = rollouts.mask
    last = mask * (1.0 - jnp.pad(mask[:, 1:], ((0, 0), (0, 1))))
    rewards = -settings.kl_coef * (rollouts.old - rollouts.reference) + last * rollouts.scores[:, None]
    gains = advantages(rewards, rollouts.values, mask, settings.gamma, settings.gae_lambda)
    returns = (gains + rollouts.values) * mask
    explained = 1.0 - _variance(returns - rollouts.values, mask) / jnp.maximum(_variance(returns, mask), 1e-8)
    fields = {'old': rollouts.old, 'values': rollouts.values, 'advantages': whiten(gains, mask), 'returns': returns}
    return fields, {'explained_variance': explained, 'value': (rollouts.values * mask).sum() / mask.sum()}


def advantages(rewards: jax.Array, values: jax.Array, weights: jax.Array, gamma: float, decay: float) -> jax.Array:
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


def loss(settings: Settings, logps: jax.Array, values: jax.Array, batch: Mapping[str, jax.Array]) -> Sums:
    """Summed loss of the answers' tokens, their number, and metrics."""
    mask = batch['loss_mask']
    losses, metrics = ratio_losses(settings, logps, batch['old'], batch['advantages'], mask)
    off, clipped = value_losses(settings, values, batch['values'], batch['returns'])
    metrics |= {'policy_loss': losses, 'value_loss': off, 'value_clip_fraction': clipped}
    total = losses + settings.value_coef * off
    return (total * mask).sum(), mask.sum(), {name: (each * mask).sum() for name, each in metrics.items()}


def value_losses(
    settings: Settings, values: jax.Array, before: jax.Array, returns: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Half the squared error of each value, the worse of it and of the value kept near what it was; and where that was.

    Args:
      settings: the recipe's `rl`.
      values: of each token, now.
      before: of each token, when the answer was written.
      returns: what they should be.
    """
    free = jnp.square(values - returns)
    if not settings.value_clip:
        return 0.5 * free, jnp.zeros_like(free)
    near = jnp.clip(values, before - settings.value_clip, before + settings.value_clip)
    clipped = jnp.square(near - returns)
    return 0.5 * jnp.maximum(free, clipped), (clipped > free).astype(jnp.float32)


ALGORITHM = Algorithm(
    name='ppo',
    token_fields=('old', 'values', 'advantages', 'returns'),
    compute_advantages=compute_advantages,
    loss=loss,
    value_head=True,
)
