"""The loss of the family: a clipped surrogate, the divergence from the reference, entropy, and a value head's error."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxtune.common.settings import Settings
from jaxtune.rl import Sums
from jaxtune.rl.choices import Choices, clip_high


def loss(
    chosen: Choices, settings: Settings, logps: jax.Array, values: jax.Array, batch: Mapping[str, jax.Array]
) -> Sums:
    """The summed loss of the answers, what it is divided by, and metrics.

    The mean is over answers, each the mean over its tokens (`rl.normalise=answer`), over tokens (`token`), or over
    answers, each the sum over its tokens divided by `generate.max_new_tokens` (`constant`).

    Args:
      chosen: which algorithm of the family.
      settings: the recipe's `rl`.
      logps: `[rows, length]`, the policy's log-probabilities now.
      values: `[rows, length]`, the value head's outputs now.
      batch: as `LossOf` says, with `entropies` where `rl.entropy_coef` is not 0.
    """
    mask, shares = batch['loss_mask'], batch['shares']  # shares: 1 / the length of an answer on each of its tokens
    segments = (batch['segment_ids'], shares) if chosen.ratio == 'sequence' else None
    losses, metrics = ratio_losses(settings, logps, batch['old'], batch['advantages'], mask, segments)
    metrics |= {'policy_loss': losses}
    total = losses
    if chosen.kl_in == 'loss':
        kl = divergence(chosen.kl, batch['reference'], logps) * mask
        metrics |= {'reference_kl': kl}
        total = total + settings.kl_coef * kl
    if not chosen.grouped:
        off, clipped = value_losses(settings, values, batch['values'], batch['returns'])
        metrics |= {'value_loss': off, 'value_clip_fraction': clipped}
        total = total + settings.value_coef * off
    if 'entropies' in batch:
        metrics |= {'policy_entropy': batch['entropies']}
        total = total - settings.entropy_coef * batch['entropies']
    if chosen.normalise == 'token':
        weights, count, of_metrics = mask, mask.sum(), mask
    else:
        weights, count, of_metrics = batch.get('constant', shares), shares.sum(), shares
    sums = {name: (each * (weights if name == 'policy_loss' else of_metrics)).sum() for name, each in metrics.items()}
    return (total * weights).sum(), count, sums


def ratio_losses(
    settings: Settings,
    logps: jax.Array,
    old: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped surrogate of each token, to be made small.

    Schulman et al. 2017, arXiv:1707.06347, equation 7; with another range above 1 (`rl.clip_high`; DAPO, Yu et al.
    2025, arXiv:2503.14476), a second limit where the advantage is below 0 (`rl.dual_clip`; Ye et al. 2019,
    arXiv:1912.09729), and the ratio of whole answers (GSPO, Zheng et al. 2025, arXiv:2507.18071).

    Args:
      settings: the recipe's `rl`.
      logps: log-probabilities, now.
      old: log-probabilities, when the answer was written.
      advantages: how much better than expected the token was.
      mask: 0 where there is no token.
      segments: `(segment_ids, shares)`, as `RolloutPacker.fields` makes them: the ratio is the answer's; None: the
        token's.

    Returns:
      Losses, and metrics of each token; shapes as given. `clip_fraction` is where the ratio was clipped,
      `clip_low_fraction` below and `clip_high_fraction` above; `approx_kl` is the divergence from the policy that
      answered.
    """
    difference = (logps - old) * mask
    ratio = jnp.exp(difference if segments is None else sequence_log_ratio(difference, *segments) * mask)
    low, high = 1.0 - settings.clip, 1.0 + clip_high(settings)
    free = -advantages * ratio
    clipped = -advantages * jnp.clip(ratio, low, high)
    losses = jnp.maximum(free, clipped)
    metrics = {
        'clip_fraction': (clipped > free).astype(jnp.float32),
        'clip_low_fraction': ((ratio < low) & (advantages < 0)).astype(jnp.float32),
        'clip_high_fraction': ((ratio > high) & (advantages > 0)).astype(jnp.float32),
        # Of the old policy from the new one (Schulman 2020, "k3").
        'approx_kl': (ratio if segments is None else jnp.exp(difference)) - 1.0 - difference,
    }
    if settings.dual_clip:
        limit = -advantages * settings.dual_clip
        beyond = (advantages < 0) & (losses > limit)
        metrics['dual_clip_fraction'] = beyond.astype(jnp.float32)
        losses = jnp.where(beyond, limit, losses)
    return losses, metrics


def sequence_log_ratio(difference: jax.Array, segment_ids: jax.Array, shares: jax.Array) -> jax.Array:
    """The mean over an answer's tokens, on each of its segment's places (GSPO, equation 7, in logarithms).

    Args:
      difference: `[rows, length]`, log-probabilities now less those when the answer was written; 0 outside answers.
      segment_ids: `[rows, length]` int32, 0 where there is nothing.
      shares: `[rows, length]`, 1 over the length of the answer on each of its tokens, else 0.
    """

    def of_row(numbers: jax.Array, segments: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(numbers, segments, num_segments=len(numbers) + 1)[segments]

    return jax.vmap(of_row)(difference * shares, segment_ids)


def divergence(estimator: str, reference: jax.Array, logps: jax.Array) -> jax.Array:
    """An estimate of each token's divergence of the policy from the reference, from the token that was drawn.

    With `r` the reference's probability over the policy's: `k1` is `-log r`, unbiased, and below 0 as often as not;
    `k2` is `(log r)^2 / 2`, biased, with the right gradient in a loss; `k3` is `r - 1 - log r`, unbiased and never
    below 0 (Schulman 2020, http://joschu.net/blog/kl-approx.html; GRPO's equation 4).
    """
    if estimator == 'k1':
        return logps - reference
    difference = reference - logps
    return 0.5 * jnp.square(difference) if estimator == 'k2' else jnp.exp(difference) - 1.0 - difference


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
