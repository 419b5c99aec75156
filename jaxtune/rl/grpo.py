"""Group relative policy optimisation: no value head, an answer is measured by its siblings (Shao et al. 2024,
arXiv:2402.03300).
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxtune.rl.policy import Found, divergence, make_row, ratio_losses, read

__all__ = ['VALUE', 'group', 'learn', 'loss', 'relative', 'row']

VALUE = False


def row(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds."""
    return make_row(config, 'old', 'reference', 'advantages')


def group(config: ConfigDict) -> int:
    """How many answers each prompt gets; those of one prompt follow each other."""
    return config.rl.group


def learn(config: ConfigDict, found: Found) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Every token has the advantage of its answer; with how many groups have nothing to tell apart."""
    scores = found.scores.reshape(-1, group(config))
    gains = relative(scores).reshape(-1, 1) * found.weights
    same = (scores.max(-1) == scores.min(-1)).astype(jnp.float32).mean()
    return {'old': found.old, 'reference': found.reference, 'advantages': gains}, {'groups_alike': same}


def relative(scores: jax.Array) -> jax.Array:
    """Scores `[groups, answers]` less their group's mean, over its standard deviation; 0 where all are the same."""
    spread = jnp.std(scores, axis=-1, keepdims=True, ddof=1)
    # The mean of equal numbers is rounded: what is left of them would pass for a difference.
    same = scores.max(-1, keepdims=True) == scores.min(-1, keepdims=True)
    return jnp.where(same, 0.0, (scores - scores.mean(-1, keepdims=True)) / (spread + 1e-4))


def loss(config, model, params, batch, rng):
    """Summed loss of the answers, each the mean over its tokens, their number, and metrics."""
    logprobs, _ = read(config, model, params, batch, rng)
    losses, metrics = ratio_losses(config.rl, logprobs, batch['old'], batch['advantages'], batch['weights'])
    away = divergence(batch['reference'], logprobs) * batch['weights']
    metrics |= {'policy_loss': losses, 'reference_kl': away}
    shares = batch['shares']
    sums = {name: (each * shares).sum() for name, each in metrics.items()}
    return ((losses + config.rl.kl_coef * away) * shares).sum(), shares.sum(), sums
