"""The algorithms that differ by keys alone: what a task takes for `auto` makes it one of them."""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from jaxtune.common.settings import Settings
from jaxtune.rl import Algorithm, RolloutBatch, Sums, advantages, losses
from jaxtune.rl.choices import Choices, choose

TITLES: Mapping[str, str] = {
    'clip_fraction': 'Ratios that were clipped',
    'clip_low_fraction': 'Ratios clipped from below',
    'clip_high_fraction': 'Ratios clipped from above',
    'dual_clip_fraction': 'Losses held by the second clip',
    'reference_kl': 'KL from the reference, in the loss',
    'policy_entropy': 'Entropy a token, in the loss',
}


def algorithm(name: str, task: Choices) -> Algorithm:
    """The algorithm of a task.

    Args:
      name: of the task.
      task: what it takes for `auto`.
    """
    return Algorithm(
        name=name,
        token_fields=task.token_fields,
        compute_advantages=functools.partial(_compute_advantages, task),
        loss=functools.partial(_loss, task),
        group=functools.partial(_group, task),
        value_head=not task.grouped,
        titles=TITLES,
        adapted=functools.partial(_adapted, task),
    )


def _compute_advantages(
    task: Choices, settings: Settings, rollouts: RolloutBatch
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    return advantages.compute_advantages(choose(settings, task), settings, rollouts)


def _loss(
    task: Choices, settings: Settings, logps: jax.Array, values: jax.Array, batch: Mapping[str, jax.Array]
) -> Sums:
    return losses.loss(choose(settings, task), settings, logps, values, batch)


def _group(task: Choices, settings: Settings) -> int:
    return settings.group if choose(settings, task).grouped else 1


def _adapted(task: Choices, settings: Settings) -> dict[str, Any]:
    chosen = choose(settings, task)
    asked = {'token_fields': chosen.token_fields, 'value_head': not chosen.grouped}
    return asked | {'reference': bool(chosen.kl_in)}
