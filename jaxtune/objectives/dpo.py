"""Learning from preference pairs without a reward model (DPO, Rafailov et al. 2023, arXiv:2305.18290) and its kin.

| `dpo.loss` | loss of a pair, with `c`, `r` the log-probabilities of its answers less the reference's |
|---|---|
| `sigmoid` | `-log sigmoid(beta (c - r))`, with `dpo.label_smoothing` mixed with that of the swapped pair |
| `ipo` | `(c / length - r / length - 1 / (2 beta))^2`, averaged per token (Azar et al. 2023, arXiv:2310.12036, sum) |
| `hinge` | `max(0, 1 - beta (c - r))` (SLiC, arXiv:2305.10425) |
| `kto` | `1 - sigmoid(beta (c - z))` and `1 - sigmoid(beta (z - r))`, unpaired data too (arXiv:2402.01306) |
| | `z` is the KL divergence to the reference on mismatched answers, a mean of the batch, at least 0 |
| `orpo` | the chosen answer's loss, less `beta log sigmoid` of the log odds ratio; no reference (arXiv:2403.07691) |
| `simpo` | `-log sigmoid(beta (mean c - mean r) - gamma)` without reference (arXiv:2405.14734) |

The reference's log-probabilities are computed once, before training (`training.reference`).
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.common.settings import Settings
from jaxtune.data.spec import DataSpec
from jaxtune.models import Model
from jaxtune.objectives import Batch, Objective, Reference, Sums, preferences
from jaxtune.objectives.cross_entropy import token_logprobs
from jaxtune.objectives.preferences import RECORDS, SIDES, Pairs, preview, stacked

_WITHOUT_REFERENCE = ('orpo', 'simpo')


def sides_of(settings: Settings) -> tuple[str, ...]:
    """Which answers a row holds: of KTO, also one to another prompt."""
    return (*SIDES, 'mismatched') if settings.loss == 'kto' else SIDES


def batch_spec(settings: Settings, data: DataSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds: a pair, and the reference's log-probability of each of its answers."""
    fields = preferences.make_row(data.seq_len, sides_of(settings))
    if settings.loss not in _WITHOUT_REFERENCE:
        fields |= {f'reference_{side}': jax.ShapeDtypeStruct((), np.float32) for side in sides_of(settings)}
    return fields


def dataset(settings: Settings, data: DataSpec, split: str, tokenizer: Any, cache: pathlib.Path) -> Pairs:
    """Pairs of `data.train` or `data.eval`; see `preferences.dataset`. KTO takes answers with a label too."""
    kto = settings.loss == 'kto'
    return preferences.dataset(data, split, tokenizer, cache, unpaired=kto, mismatched=kto)


def reference_path(settings: Settings) -> str | None:
    """Where the reference is; None for losses without one."""
    return None if settings.loss in _WITHOUT_REFERENCE else settings.reference


def reference_logps(model: Model, params: Any, batch: Batch, sides: tuple[str, ...]) -> jax.Array:
    """The reference's log-probabilities `[pairs, sides]` of the answers, in nats."""
    return logprobs(model, params, batch, sides)[0]


def logprobs(
    model: Model, params: Any, batch: Batch, sides: tuple[str, ...], rng: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`(sums, lengths)`, each `[rows, sides]`: the log-probability of each answer in nats, and its tokens."""
    inputs = stacked(batch, sides)
    outputs = model.apply(params, inputs, rng=rng)
    logps = token_logprobs(outputs.hidden, model.head(params), inputs['targets']) * inputs['loss_mask']
    shape = (-1, len(sides))
    return logps.sum(-1).reshape(shape), inputs['loss_mask'].sum(-1).reshape(shape)


def statistics(settings: Settings) -> Callable[[Model, Any, Batch], dict[str, Any]] | None:
    """KTO's `kl`: by how much answers to other prompts are likelier than under the reference, in nats an answer."""
    if settings.loss != 'kto':
        return None

    def kl(model: Model, params: Any, batch: Batch) -> dict[str, Any]:
        real = jnp.maximum(batch['chosen_weight'], batch['rejected_weight'])
        sums, _ = logprobs(model, params, batch, ('mismatched',))
        return {'kl': (((sums[:, 0] - batch['reference_mismatched']) * real).sum(), real.sum())}

    return kl


def loss(settings: Settings, model: Model, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
    """Summed loss of the pairs (of KTO: of the answers), their number, and metrics.

    Rewards are `beta` times the log-probability less the reference's (SimPO's: the mean one, ORPO's: without it);
    `margin` is the chosen's less the rejected's, `accuracy` how often that is above 0.
    """
    sums, lengths = logprobs(model, params, batch, SIDES, rng)
    reference = jnp.zeros_like(sums)
    if settings.loss not in _WITHOUT_REFERENCE:
        reference = jnp.stack([batch[f'reference_{side}'] for side in SIDES], axis=1)
    weights = jnp.stack([batch['chosen_weight'], batch['rejected_weight']], axis=1)
    kl = batch.get('kl', 0.0)  # of `statistics`, which the step adds to the batch
    losses, chosen, rejected = losses_of(settings, sums, reference, jnp.maximum(lengths, 1), weights, kl)
    chosen, rejected = jax.lax.stop_gradient((chosen, rejected))
    paired = weights.min(1)
    count = weights.sum() if settings.loss == 'kto' else paired.sum()
    metrics = {
        'accuracy': ((chosen > rejected) * paired, paired),
        'margin': ((chosen - rejected) * paired, paired),
        'reward_chosen': (chosen * weights[:, 0], weights[:, 0]),
        'reward_rejected': (rejected * weights[:, 1], weights[:, 1]),
    }
    return losses.sum(), count, jax.tree.map(jnp.sum, metrics)


def losses_of(
    settings: Settings,
    sums: jax.Array,
    reference: jax.Array,
    lengths: jax.Array,
    weights: jax.Array,
    kl: jax.Array | float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses `[pairs]` and the rewards of chosen and rejected answers.

    Args:
      settings: the recipe's `dpo`.
      sums: log-probabilities `[pairs, 2]`.
      reference: the reference's.
      lengths: tokens of the answers, at least 1.
      weights: `[pairs, 2]`, 0 where a side is missing; of a pair the smaller one counts.
      kl: of `statistics`, the mean over the whole batch that KTO measures answers against.
    """
    beta, smooth = settings.beta, settings.label_smoothing
    ratios, means = sums - reference, sums / lengths
    both = weights.min(1)
    chosen, rejected = ratios[:, 0], ratios[:, 1]
    rewards = beta * chosen, beta * rejected
    if settings.loss == 'sigmoid':
        losses = _smoothed(beta * (chosen - rejected), smooth)
    elif settings.loss == 'hinge':
        losses = jax.nn.relu(1 - beta * (chosen - rejected))
    elif settings.loss == 'ipo':
        losses = jnp.square(chosen / lengths[:, 0] - rejected / lengths[:, 1] - 1 / (2 * beta))
    elif settings.loss == 'simpo':
        rewards = beta * means[:, 0], beta * means[:, 1]
        losses = _smoothed(rewards[0] - rewards[1] - settings.gamma, smooth)
    elif settings.loss == 'orpo':
        log_odds_ratio = means[:, 0] - means[:, 1] - (_log1mexp(means[:, 0]) - _log1mexp(means[:, 1]))
        rewards = beta * means[:, 0], beta * means[:, 1]
        losses = -means[:, 0] - beta * jax.nn.log_sigmoid(log_odds_ratio)
    else:  # kto
        baseline = jnp.maximum(kl, 0.0)
        desirable = settings.chosen_weight * (1 - jax.nn.sigmoid(beta * (chosen - baseline)))
        undesirable = settings.rejected_weight * (1 - jax.nn.sigmoid(beta * (baseline - rejected)))
        return desirable * weights[:, 0] + undesirable * weights[:, 1], *rewards
    return losses * both, *rewards


def _smoothed(logits: jax.Array, smooth: float) -> jax.Array:
    losses = -(1 - smooth) * jax.nn.log_sigmoid(logits)
    return losses - smooth * jax.nn.log_sigmoid(-logits) if smooth else losses


def _log1mexp(x: jax.Array) -> jax.Array:
    """`log(1 - exp(x))` for x < 0, also near 0 (Mächler 2012)."""
    near = x > -0.6931472
    small = jnp.log(-jnp.expm1(jnp.where(near, jnp.minimum(x, -1e-7), -1.0)))
    return jnp.where(near, small, jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))


OBJECTIVE = Objective(
    name='dpo',
    batch_spec=batch_spec,
    dataset=dataset,
    loss=loss,
    records=RECORDS,
    kinds=('decoder',),
    statistics=statistics,
    reference=Reference(reference_path, 'dpo.reference', sides_of, reference_logps),
    preview=preview,
    rows_per_example=2,
    counted='pairs',
)
