"""The pure functions that are jitted: one update, one evaluated batch."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jaxtune.models.frozen import FrozenModel
from jaxtune.optim.offload import scaled
from jaxtune.optim.optimizers import clip_factor
from jaxtune.optim.stochastic_rounding import apply_updates
from jaxtune.parallel import BATCH_AXES
from jaxtune.weights import eval_mode
from jaxtune.weights.tree import combine

# {'step': int32, 'trainable': tree, 'opt_state': tree}: what an update changes, and so what a checkpoint holds.
State = dict[str, Any]
# Rows, and what is the same for all of them: a `FrozenModel` that the loss asks.
Batch = Mapping[str, Any]
Sums = tuple[jax.Array, jax.Array, dict[str, Any]]
Loss = Callable[[Any, Batch, jax.Array | None], Sums]
# `(params, batch) -> {name: (sum, count)}`; see `objectives`.
Statistics = Callable[[Any, Batch], dict[str, tuple[jax.Array, jax.Array]]]

_ROUNDING = zlib.crc32(b'rounding')  # what its key is folded with, apart from those of the loss


def init_state(trainable: Any, optimizer: optax.GradientTransformation) -> State:
    """The state before the first update."""
    return {'step': jnp.zeros((), jnp.int32), 'trainable': trainable, 'opt_state': optimizer.init(trainable)}


def _micro_batches(batch: Batch, accumulate: int) -> Batch:
    """`[batch, ...]` as `[accumulate, batch / accumulate, ...]`.

    Every `accumulate`-th row goes to one micro-batch: then each device cuts up its own rows and none of them moves.
    """

    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return x
        length = ('sequence',) if x.ndim > 2 else ()
        return jax.lax.with_sharding_constraint(x, P(None, BATCH_AXES, *length))

    return jax.tree.map(cut, batch)


def mean(value: Any, count: jax.Array) -> jax.Array:
    """The mean of a metric: its sum over `count`, or over the count that comes with it; NaN of nothing."""
    total, count = value if isinstance(value, tuple) else (value, count)
    return total / count


def _whole_means(
    statistics: Statistics, params: Any, batches: Batch, whole: Batch, accumulate: int
) -> dict[str, jax.Array]:
    """Means over all micro-batches, which no gradient goes through; `whole` is the same for all of them."""
    params = jax.lax.stop_gradient(eval_mode(params))
    if accumulate == 1:
        sums = statistics(params, {**batches, **whole})
    else:
        asked = jax.lax.map(lambda batch: statistics(params, {**batch, **whole}), batches)
        sums = jax.tree.map(lambda x: x.sum(0), asked)
    return {name: total / jnp.maximum(count, 1.0) for name, (total, count) in sums.items()}


def gradients(
    loss: Loss,
    trainable: Any,
    frozen: Any,
    batch: Batch,
    rng: jax.Array,
    accumulate: int,
    statistics: Statistics | None = None,
) -> tuple[Any, Sums]:
    """Gradient of the summed loss with its sums, over micro-batches.

    Returns:
      `(grads, (sum, count, metrics))`, all of them sums over the whole batch; those of micro-batches are added up in
      float32.
    """

    def summed(trainable: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Sums]:
        total, count, metrics = loss(combine(trainable, frozen), batch, rng)
        return total, (total, count, metrics)

    grad = jax.grad(summed, has_aux=True)
    whole = {name: value for name, value in batch.items() if isinstance(value, FrozenModel)}
    rows = {name: value for name, value in batch.items() if name not in whole}
    micro = rows if accumulate == 1 else _micro_batches(rows, accumulate)
    if statistics is not None:
        whole |= _whole_means(statistics, combine(trainable, frozen), micro, whole, accumulate)
    if accumulate == 1:
        return grad(trainable, {**rows, **whole}, rng)
    rngs = jax.random.split(rng, accumulate)
    shapes = jax.eval_shape(grad, trainable, {**jax.tree.map(lambda x: x[0], micro), **whole}, rng)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)), shapes)

    def add(sums: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        batch, rng = xs
        return jax.tree.map(
            lambda total, part: total + part.astype(total.dtype), sums, grad(trainable, {**batch, **whole}, rng)
        ), None

    return jax.lax.scan(add, zeros, (micro, rngs))[0]


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    *,
    seed: int,
    accumulate: int = 1,
    clip_norm: float = 0.0,
    statistics: Statistics | None = None,
    settle: Callable[[Any, Any], tuple[Any, dict[str, Any]]] = lambda trainable, sums: (trainable, sums),
    update: Callable[[Any, jax.Array, Any, Any, jax.Array], tuple[Any, Any]] | None = None,
) -> Callable[[State, Any, Batch], tuple[State, dict[str, jax.Array]]]:
    """One update as a pure function `(state, frozen, batch) -> (state, metrics)`.

    Args:
      loss: `(params, batch, rng) -> (sum, count, metrics)`.
      optimizer: from `optim.make_optimizer`.
      rate: its schedule, for the log.
      seed: randomness of update `t` is a function of (seed, t).
      accumulate: micro-batches that the batch is cut into.
      clip_norm: global norm of the mean gradient at most; 0 = off.
      statistics: of the objective, or None.
      settle: `(trainable, sums) -> (trainable, sums)`, what follows an update.
      update: `(grads, factor, opt_state, trainable, key) -> (trainable, opt_state)`, which multiplies gradients
        by the factor; None = the optimizer's of everything.
    """

    def update_whole(grads: Any, factor: jax.Array, opt_state: Any, trainable: Any, key: jax.Array) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(scaled(grads, factor), opt_state, trainable)
        return apply_updates(trainable, updates, key), opt_state

    def train_step(state: State, frozen: Any, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(seed), state['step'])
        grads, (total, count, sums) = gradients(loss, state['trainable'], frozen, batch, rng, accumulate, statistics)
        with jax.named_scope('optimizer'):
            scale = 1.0 / jnp.maximum(count, 1.0)
            norm = scale * optax.tree.norm(jax.tree.map(lambda grad: grad.astype(jnp.float32), grads))
            factor = scale * clip_factor(norm, clip_norm)
            key = jax.random.fold_in(rng, _ROUNDING)
            trainable, opt_state = (update or update_whole)(grads, factor, state['opt_state'], state['trainable'], key)
        trainable, sums = settle(trainable, sums)
        metrics = {
            'loss': total * scale,
            'grad_norm': norm,
            'learning_rate': jnp.asarray(rate(state['step']), jnp.float32),
            'count': count,
            **{name: mean(value, count) for name, value in sums.items()},
        }
        return {'step': state['step'] + 1, 'trainable': trainable, 'opt_state': opt_state}, metrics

    return train_step


def make_statistics(statistics: Statistics) -> Callable[[Any, Any, Batch], dict[str, Any]]:
    """An objective's statistics of one evaluated batch `(trainable, frozen, batch) -> {name: (sum, count)}`."""
    return lambda trainable, frozen, batch: statistics(eval_mode(combine(trainable, frozen)), batch)


def make_eval_step(loss: Loss) -> Callable[[Any, Any, Batch], dict[str, Any]]:
    """One evaluated batch as a pure function `(trainable, frozen, batch) -> sums` (`loss`, `count`, metrics)."""

    def eval_step(trainable: Any, frozen: Any, batch: Batch) -> dict[str, Any]:
        total, count, sums = loss(eval_mode(combine(trainable, frozen)), batch, None)
        return {'loss': total, 'count': count, **sums}

    return eval_step
