"""Optimizers and learning-rate schedules, composed from optax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from optax import contrib

from jaxtune.errors import UserError
from jaxtune.optim8bit import scale_by_adam_8bit
from jaxtune.parallel.rules import path_name

Schedule = Callable[[jax.Array], jax.Array]

DECAYED = ('kernel', 'embedding', '/a', '/b')


def schedule(config: ConfigDict, steps: int) -> Schedule:
    """Learning rate at update 0, 1, …: linear warm-up to `lr`, then the course that `schedule` names.

    `cosine` ends at `min_ratio` of the peak (SGDR, arXiv:1608.03983), `linear` at 0, `constant` stays; `wsd` stays and
    falls to 0 over the last `decay_ratio` of the updates (arXiv:2404.06395).
    """
    peak, warmup = config.lr, min(config.warmup_steps, steps)
    rest = max(1, steps - warmup)
    if config.schedule == 'cosine':
        after = optax.cosine_decay_schedule(peak, rest, config.min_ratio)
    elif config.schedule == 'linear':
        after = optax.linear_schedule(peak, 0.0, rest)
    elif config.schedule == 'wsd':
        decay = max(1, round(steps * config.decay_ratio))
        after = optax.linear_schedule(peak, 0.0, decay, transition_begin=max(0, rest - decay))
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    # The first update already learns: rate 0 would waste it.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, after], [warmup])


def _adam(config: ConfigDict) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1 or 0.9, config.b2 or 0.999, config.eps)


def _muon(config: ConfigDict) -> optax.GradientTransformation:
    """Muon for kernels, Adam for the rest; updates are scaled to AdamW's size, so that one rate suits both.

    Keller Jordan 2024; the scale 0.2 sqrt(max(in, out)) is arXiv:2502.16982's. Stacked layers are batched.
    """
    matrices = contrib.scale_by_muon(
        beta=config.b1 or 0.95,
        weight_dimension_numbers=lambda tree: jax.tree.map(
            lambda leaf: contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1), tree
        ),
    )

    def size(update):
        return update * (0.2 * max(update.shape[-2:]) ** 0.5)

    matrices = optax.chain(matrices, optax.stateless(lambda updates, params: jax.tree.map(size, updates)))

    def label(path, leaf):
        name = path_name(path)
        return 'muon' if name.endswith('kernel') and 'lm_head' not in name and leaf.ndim >= 2 else 'adam'

    adam = optax.scale_by_adam(0.9, config.b2 or 0.95, config.eps)
    return optax.partition({'muon': matrices, 'adam': adam}, lambda tree: jax.tree_util.tree_map_with_path(label, tree))


_RULES = {
    'adamw': _adam,
    'adamw8bit': lambda config: scale_by_adam_8bit(config.b1 or 0.9, config.b2 or 0.999, config.eps),
    'adafactor': lambda config: optax.chain(optax.scale_by_factored_rms(decay_rate=0.8), optax.clip_by_block_rms(1.0)),
    'lion': lambda config: optax.scale_by_lion(config.b1 or 0.9, config.b2 or 0.99),
    'muon': _muon,
    'sgd': lambda config: optax.trace(config.b1 or 0.9),
}


def make_optimizer(
    config: ConfigDict,
    steps: int,
    fresh: frozenset[str] = frozenset(),
    rate: Callable[[str], float] | None = None,
) -> optax.GradientTransformation:
    """The update rule of a recipe's `optimizer`.

    Args:
      config: the subtree `optimizer`.
      steps: updates of the whole run (the schedule ends there).
      fresh: paths of parameters that the loaded model lacked: their rate peaks at `new_lr` instead of `lr`.
      rate: path of a parameter -> further factor on its rate.

    Raises:
      UserError: the name is not in this version.
    """
    if config.name not in _RULES:
        raise UserError(f'optimizer.name={config.name!r}: not in this version; expected one of {", ".join(_RULES)}')

    def decayed(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).endswith(DECAYED), tree)

    def boost(updates, state, params=None):
        def scaled(path, update):
            name = path_name(path)
            factor = (config.new_lr / config.lr if name in fresh else 1.0) * (rate(name) if rate else 1.0)
            return update if factor == 1.0 else update * factor

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.chain(
        _RULES[config.name](config),
        optax.add_decayed_weights(config.weight_decay, decayed) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule(config, steps)),
        optax.GradientTransformation(lambda params: optax.EmptyState(), boost) if fresh or rate else optax.identity(),
    )


def clip(grads, norm: jax.Array, limit: float):
    """Scales gradients down to a global norm of `limit` (0 = off), given their norm."""
    if not limit:
        return grads
    factor = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-16))
    return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads)
