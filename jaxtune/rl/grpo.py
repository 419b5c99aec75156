"""Group relative policy optimisation: no value head, an answer is measured by its siblings.

Shao et al. 2024, arXiv:2402.03300.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxtune.common.settings import Settings
from jaxtune.rl import Algorithm, RolloutBatch, Sums
from jaxtune.rl.policy import divergence, ratio_losses


def group(settings: Settings) -> int:
    """How many answers each prompt gets; those of one prompt follow each other."""
    return settings.group


def compute_advantages(settings: Settings, rollouts: RolloutBatch) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Every token has the advantage of its answer; with the share of groups that have nothing to tell apart."""
    scores = rollouts.scores.reshape(-1, group(settings))
    advantages = group_normalised(scores).reshape(-1, 1) * rollouts.mask
    zero_std = (scores.max(-1) == scores.min(-1)).astype(jnp.float32).mean()
    fields = {'old': rollouts.old, 'reference': rollouts.reference, 'advantages': advantages}
    return fields, {'frac_reward_zero_std': zero_std}


def group_normalised(scores: jax.Array) -> jax.Array:
    """Scores `[groups, answers]` less their group's mean, over its sample standard deviation plus 1e-4.

    They are 0 where all of a group are the same: the mean of equal numbers is rounded, and what is left of them would
    pass for a difference.
    """
    std = jnp.std(scores, axis=-1, keepdims=True, ddof=1)
    same = scores.max(-1, keepdims=True) == scores.min(-1, keepdims=True)
    return jnp.where(same, 0.0, (scores - scores.mean(-1, keepdims=True)) / (std + 1e-4))


def loss(settings: Settings, logps: jax.Array, values: jax.Array, batch: Mapping[str, jax.Array]) -> Sums:
    """Summed loss of the answers, each the mean over its tokens, their number, and metrics."""
    losses, metrics = ratio_losses(settings, logps, batch['old'], batch['advantages'], batch['loss_mask'])
    kl = divergence(batch['reference'], logps) * batch['loss_mask']
    metrics |= {'policy_loss': losses, 'reference_kl': kl}
    shares = batch['shares']  # 1 / the length of an answer on each of its tokens
    sums = {name: (each * shares).sum() for name, each in metrics.items()}
    return ((losses + settings.kl_coef * kl) * shares).sum(), shares.sum(), sums


ALGORITHM = Algorithm(
    name='grpo',
    token_fields=('old', 'reference', 'advantages'),
    compute_advantages=compute_advantages,
    loss=loss,
    group=group,
)
