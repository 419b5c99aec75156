"""Optimizers and learning-rate schedules, composed from optax."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxtune.common.settings import Settings
from jaxtune.errors import UserError
from jaxtune.optim.adam8bit import scale_by_adam_8bit
from jaxtune.parallel.rules import path_name
from jaxtune.weights.tree import layer_dims

DECAYED = ('kernel', 'embedding', '/rows', '/a', '/b')


def schedule(config: Settings, steps: int) -> optax.Schedule:
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


class Betas(NamedTuple):
    """Decays of the first and the second moment, and what is added to the root of the second (or to its square)."""

    b1: float
    b2: float
    eps: float


# What each optimizer's own paper has. Muon's second number and eps are of its Adam part.
PAPERS = {
    'adamw': Betas(0.9, 0.999, 1e-8),  # Kingma and Ba 2014, arXiv:1412.6980
    'adamw8bit': Betas(0.9, 0.999, 1e-8),
    'adafactor': Betas(0.0, 1.0, 1e-30),  # Shazeer and Stern 2018, arXiv:1804.04235: no momentum, b2 by its own course
    'lion': Betas(0.9, 0.99, 0.0),  # Chen et al. 2023, arXiv:2302.06675
    'muon': Betas(0.95, 0.95, 1e-8),  # Jordan 2024
    'sgd': Betas(0.9, 0.0, 0.0),  # Sutskever et al. 2013, "On the importance of initialization and momentum"
}


def betas(config: Settings) -> Betas:
    """Those of a recipe's `optimizer`: its paper's where it says `auto`."""
    given = (config.b1, config.b2, config.eps)
    return Betas(*(own if value == 'auto' else value for value, own in zip(given, PAPERS[config.name], strict=True)))


def _adafactor(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adafactor (arXiv:1804.04235) with a learning rate from outside; every matrix by itself, not a stack of layers.

    The second moment decays by `1 - t ** -0.8`, at most by `b2` (Zhai et al. 2021, arXiv:2106.04560).
    """

    def own(path: tuple) -> tuple[int, ...]:
        return tuple(range(-layer_dims(path_name(path)), 0))

    def init(params: Any) -> AdafactorState:
        def zeros(path: tuple, leaf: jax.Array) -> Any:
            if len(own(path)) == 1:
                return jnp.zeros(leaf.shape)
            return {'row': jnp.zeros(leaf.shape[:-1]), 'col': jnp.zeros((*leaf.shape[:-2], leaf.shape[-1]))}

        return AdafactorState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(zeros, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, 'AdafactorState']:
        count = state.count + 1
        decay = jnp.minimum(b2, 1.0 - count.astype(jnp.float32) ** -0.8)

        def moved(was: jax.Array, value: jax.Array) -> jax.Array:
            return decay * was + (1.0 - decay) * value

        def rule(path: tuple, grad: jax.Array, was: Any) -> tuple[jax.Array, Any]:
            square = jnp.square(grad) + eps
            if isinstance(was, dict):
                nu = {'row': moved(was['row'], square.mean(-1)), 'col': moved(was['col'], square.mean(-2))}
                row = jax.lax.rsqrt(nu['row'] / nu['row'].mean(-1, keepdims=True))
                step = grad * row[..., None] * jax.lax.rsqrt(nu['col'])[..., None, :]
            else:
                nu = moved(was, square)
                step = grad * jax.lax.rsqrt(nu)
            size = jnp.sqrt(jnp.square(step).mean(own(path), keepdims=True))
            return step / jnp.maximum(1.0, size), nu

        leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
        pairs = [rule(*leaf, was) for leaf, was in zip(leaves, structure.flatten_up_to(state.nu), strict=True)]
        steps, nu = (structure.unflatten(part) for part in zip(*pairs, strict=True))
        return steps, AdafactorState(count, nu)

    rule = optax.GradientTransformation(init, update)
    return optax.chain(rule, optax.ema(b1, debias=False)) if b1 else rule


class AdafactorState(NamedTuple):
    """Updates done, and second moments: of rows `[*layers, in]` and columns `[*layers, out]`, or of vectors whole."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # checkpoints name it so
    nu: Any


def _muon(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Muon for kernels, Adam for the rest; updates are scaled to AdamW's size, so that one rate suits both.

    Jordan 2024, "Muon: An optimizer for hidden layers in neural networks"; the scale 0.2 sqrt(max(in, out)) is
    arXiv:2502.16982's. Stacked layers are batched.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, 'MuonState']:
        mu = jax.tree.map(lambda was, grad: b1 * was + (1.0 - b1) * grad, state.mu, updates)
        ahead = jax.tree.map(lambda mu, grad: b1 * mu + (1.0 - b1) * grad, mu, updates)  # Nesterov's
        return jax.tree.map(_orthogonalised, ahead), MuonState(mu)

    def label(path: tuple, leaf: jax.Array) -> str:
        name = path_name(path)
        return 'muon' if name.endswith('kernel') and 'lm_head' not in name and leaf.ndim >= 2 else 'adam'

    rules: dict[Hashable, optax.GradientTransformation] = {
        'muon': optax.GradientTransformation(init, update),
        'adam': optax.scale_by_adam(0.9, b2, eps),
    }
    return optax.partition(rules, lambda tree: jax.tree_util.tree_map_with_path(label, tree))


class MuonState(NamedTuple):
    """The momentum."""

    mu: Any


def _orthogonalised(update: jax.Array) -> jax.Array:
    """`[*layers, in, out]` with singular values near 1 (five Newton-Schulz iterations), scaled to AdamW's size."""
    dims = (*range(update.ndim - 2), update.ndim - 1, update.ndim - 2)
    tall = update.shape[-2] > update.shape[-1]
    x = update.transpose(dims) if tall else update
    x = x / (jnp.sqrt(jnp.square(x).sum((-2, -1), keepdims=True)) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.transpose(dims) if tall else x) * (0.2 * max(update.shape[-2:]) ** 0.5)


_RULES: dict[str, Callable[[float, float, float], optax.GradientTransformation]] = {
    'adamw': optax.scale_by_adam,
    'adamw8bit': scale_by_adam_8bit,
    'adafactor': _adafactor,
    'lion': lambda b1, b2, eps: optax.scale_by_lion(b1, b2),
    'muon': _muon,
    'sgd': lambda b1, b2, eps: optax.trace(b1),
}


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _in_float32(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """A rule whose state and arithmetic are float32, whatever parameters and gradients are kept in."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return rule.update(_wide(updates), state, params)

    return optax.GradientTransformation(lambda params: rule.init(_wide(params)), update)


def make_optimizer(
    config: Settings,
    steps: int,
    newly_initialized: frozenset[str] = frozenset(),
    rate: Callable[[str], float] | None = None,
) -> optax.GradientTransformation:
    """The update rule of a recipe's `optimizer`; its state and its updates are float32.

    Args:
      config: the subtree `optimizer`.
      steps: updates of the whole run (the schedule ends there).
      newly_initialized: paths of parameters that the loaded model lacked: their rate peaks at `new_lr` instead of `lr`.
      rate: path of a parameter -> further factor on its rate.

    Raises:
      UserError: the name is not in this version.
    """
    if config.name not in _RULES:
        raise UserError(f'optimizer.name={config.name!r}: not in this version; expected one of {", ".join(_RULES)}')

    def decay(updates: Any, params: Any) -> Any:
        def decayed(path: tuple, update: jax.Array, param: jax.Array) -> jax.Array:
            shrinks = config.weight_decay and path_name(path).endswith(DECAYED)
            return update + config.weight_decay * param if shrinks else update

        return jax.tree_util.tree_map_with_path(decayed, _wide(updates), _wide(params))

    def boost(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def scaled(path: tuple, update: jax.Array) -> jax.Array:
            name = path_name(path)
            factor = (config.new_lr / config.lr if name in newly_initialized else 1.0) * (rate(name) if rate else 1.0)
            return update if factor == 1.0 else update * factor

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    rule = _RULES[config.name](*betas(config))
    return optax.chain(
        rule if config.name == 'adamw8bit' else _in_float32(rule),  # it widens by itself, a layer at a time
        optax.stateless(decay),
        optax.scale_by_learning_rate(schedule(config, steps)),
        optax.GradientTransformation(lambda params: optax.EmptyState(), boost)
        if newly_initialized or rate
        else optax.identity(),
    )


def clip_factor(norm: jax.Array, limit: float) -> jax.Array | float:
    """What gradients of a global norm are multiplied by, so that it is `limit` at most; 0 = off."""
    chex.assert_rank(norm, 0, custom_message='norm')
    return jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-16)) if limit else 1.0
