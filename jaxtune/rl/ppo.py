"""Proximal policy optimisation with a value head, as in InstructGPT (Schulman et al. 2017, arXiv:1707.06347; Ouyang et
al. 2022, arXiv:2203.02155).

Every token costs `rl.kl_coef` times its log-probability above the reference's; the last one brings the reward.
"""

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from jaxtune.rl.policy import Found, make_row, ratio_losses, read

__all__ = ['VALUE', 'advantages', 'group', 'learn', 'loss', 'row', 'value_losses', 'whiten']

VALUE = True


def row(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds."""
    return make_row(config, 'old', 'values', 'advantages', 'returns')


def group(config: ConfigDict) -> int:
    """Each prompt is answered once."""
    return 1


def learn(config: ConfigDict, found: Found) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Advantages, whitened over all tokens, and returns; with how well the value head foresaw these."""
    settings, weights = config.rl, found.weights
    last = weights * (1.0 - jnp.pad(weights[:, 1:], ((0, 0), (0, 1))))
    rewards = -settings.kl_coef * (found.old - found.reference) + last * found.scores[:, None]
    gains = advantages(rewards, found.values, weights, settings.gamma, settings.gae_lambda)
    returns = (gains + found.values) * weights
    explained = 1.0 - _variance(returns - found.values, weights) / jnp.maximum(_variance(returns, weights), 1e-8)
    fields = {'old': found.old, 'values': found.values, 'advantages': whiten(gains, weights), 'returns': returns}
    return fields, {'value_explained': explained, 'value': (found.values * weights).sum() / weights.sum()}


def advantages(rewards: jax.Array, values: jax.Array, weights: jax.Array, gamma: float, decay: float) -> jax.Array:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438), `[answers, width]`.

    Args:
      rewards: `[answers, width]`, what came after each token.
      values: `[answers, width]`, what was expected before it.
      weights: `[answers, width]`, 1 for the tokens of an answer; the value after them is 0.
      gamma: discount.
      decay: lambda.
    """

    def back(after, here):
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


def loss(config, model, params, batch, rng):
    """Summed loss of the answers' tokens, their number, and metrics."""
    logprobs, values = read(config, model, params, batch, rng)
    weights = batch['weights']
    losses, metrics = ratio_losses(config.rl, logprobs, batch['old'], batch['advantages'], weights)
    off, clipped = value_losses(config.rl, values, batch['values'], batch['returns'])
    metrics |= {'policy_loss': losses, 'value_loss': off, 'value_clip_fraction': clipped}
    total = losses + config.rl.value_coef * off
    return (total * weights).sum(), weights.sum(), {name: (each * weights).sum() for name, each in metrics.items()}


def value_losses(settings: ConfigDict, values: jax.Array, before: jax.Array, returns: jax.Array):
    """Half the squared error of each value, the worse of it and of the value kept near what it was; and where that was.

    Args:
      settings: the recipe's `rl`.
      values, before: of each token now, and when the answer was written.
      returns: what they should be.
    """
    free = jnp.square(values - returns)
    if not settings.value_clip:
        return 0.5 * free, jnp.zeros_like(free)
    near = jnp.clip(values, before - settings.value_clip, before + settings.value_clip)
    kept = jnp.square(near - returns)
    return 0.5 * jnp.maximum(free, kept), (kept > free).astype(jnp.float32)
