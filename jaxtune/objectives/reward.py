"""Reward models: from pairs of answers, one number an answer (Bradley and Terry 1952; Ouyang et al. 2022, 2203.02155).

The number is read off the last real token of an answer. The exported folder is a sequence classifier with one label.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.common.settings import Settings
from jaxtune.data.spec import DataSpec
from jaxtune.models import Model
from jaxtune.objectives import Batch, Objective, Sums, preferences
from jaxtune.objectives.preferences import RECORDS, SIDES, Pairs, preview

_BINS = 10  # of confidence, for the calibration error


def batch_spec(settings: Settings, data: DataSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds: a pair."""
    return preferences.make_row(data.seq_len)


def dataset(settings: Settings, data: DataSpec, split: str, tokenizer: Any, cache: pathlib.Path) -> Pairs:
    """Pairs of `data.train` or `data.eval`; see `preferences.dataset`."""
    return preferences.dataset(data, split, tokenizer, cache)


def label_fields(settings: Settings, data: DataSpec) -> dict[str, dict]:
    """Hugging Face's config fields of a classifier with one label."""
    return {'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}


def rewards(model: Model, params: Any, inputs: Batch, rng: jax.Array | None = None) -> jax.Array:
    """The reward of each row, `[rows]` float32.

    Args:
      model: with a `reward` head.
      params: its parameters.
      inputs: a model's batch, with `ends [rows]`: the number of tokens of each row.
      rng: for dropout of added weights.
    """
    hidden = model.apply(params, inputs, rng=rng).hidden
    last = jnp.take_along_axis(hidden, jnp.maximum(inputs['ends'] - 1, 0)[:, None, None], axis=1)[:, 0]
    # A sum of products, not a matrix product: those round their inputs on some accelerators.
    return (last.astype(jnp.float32) * model.head(params).kernel[:, 0].astype(jnp.float32)).sum(-1)


def loss(settings: Settings, model: Model, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
    """Summed Bradley-Terry loss of the pairs, their number, and how often the better answer has the higher reward.

    `-log sigmoid(chosen - rejected - margin)` (margins: Llama 2, arXiv:2307.09288), smoothed by
    `reward.label_smoothing`, and `reward.center * (chosen + rejected)^2` (Eisenstein et al. 2023, arXiv:2312.09244).
    """
    scores = rewards(model, params, preferences.stacked(batch, SIDES), rng).reshape(-1, 2)
    weights = batch['chosen_weight']
    losses, metrics = pair_losses(settings, scores[:, 0], scores[:, 1], batch['margin'])
    if rng is None:
        metrics |= calibration(scores[:, 0] - scores[:, 1])
    sums = {name: (values * weights).sum() for name, values in metrics.items()}
    return (losses * weights).sum(), weights.sum(), sums


def pair_losses(
    settings: Settings, chosen: jax.Array, rejected: jax.Array, margin: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Losses `[pairs]` and metrics of pairs of rewards; `settings` are the recipe's `reward`."""
    difference = chosen - rejected
    smooth = settings.label_smoothing
    losses = -(1 - smooth) * jax.nn.log_sigmoid(difference - margin)
    if smooth:
        losses -= smooth * jax.nn.log_sigmoid(margin - difference)
    if settings.center:
        losses += settings.center * jnp.square(chosen + rejected)
    metrics = {
        'accuracy': (difference > 0).astype(jnp.float32),
        'margin': difference,
        'reward_chosen': chosen,
        'reward_rejected': rejected,
    }
    return losses, metrics


def calibration(difference: jax.Array) -> dict[str, jax.Array]:
    """By bin of confidence in the preferred answer, confidence less correctness; see `summarise`."""
    confidence = jax.nn.sigmoid(jnp.abs(difference))
    gap = confidence - (difference > 0)
    bins = jnp.clip(((confidence - 0.5) * 2 * _BINS).astype(jnp.int32), 0, _BINS - 1)
    return {f'calibration_{number}': jnp.where(bins == number, gap, 0.0) for number in range(_BINS)}


def summarise(sums: dict[str, float], count: float) -> dict[str, float]:
    """Means, and the expected calibration error (Guo et al. 2017, arXiv:1706.04599) over bins of confidence."""
    bins = [name for name in sums if name.startswith('calibration_')]
    means = {name: value / count for name, value in sums.items() if name not in bins}
    return means | {'calibration_error': sum(abs(sums[name]) for name in bins) / count}


OBJECTIVE = Objective(
    name='reward',
    batch_spec=batch_spec,
    dataset=dataset,
    loss=loss,
    records=RECORDS,
    kinds=('decoder',),
    head='reward',
    label_fields=label_fields,
    summarise=summarise,
    preview=preview,
    rows_per_example=2,
    counted='pairs',
    auto_class='SequenceClassification',
)
