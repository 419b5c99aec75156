"""Distillation: a model learns what a frozen teacher says of every token (Hinton et al. 2015, arXiv:1503.02531).

The loss of a token is `(1 - weight) * cross-entropy + weight * divergence`, the latter from the teacher's distribution
as `divergence` has it (GKD, Agarwal et al. 2023, arXiv:2306.13649). The tokens are those that `causal_lm` would score:
of texts all, of conversations what the assistant writes. The teacher may be of any family, width and depth; its
tokenizer is the student's.

Held out, `loss` is the cross-entropy alone, as `causal_lm` and `sft` have it; `divergence` is beside it.
"""

import functools
from typing import Any

import jax

from jaxtune.common.settings import Settings
from jaxtune.models import Model
from jaxtune.models.frozen import FrozenModel
from jaxtune.objectives import TEACHER, Batch, Objective, Sums, Teacher, by_position, exact_match
from jaxtune.objectives.causal_lm import RECORDS, batch_spec, dataset
from jaxtune.objectives.divergence import distillation
from jaxtune.objectives.sft import preview


def loss(settings: Settings, model: Model, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
    """Summed loss, the number of scored tokens, and their cross-entropy and divergence, in nats."""
    teacher = batch[TEACHER]
    assert isinstance(teacher, FrozenModel)
    inputs = {name: value for name, value in batch.items() if name != TEACHER}
    hidden, head = model.apply(params, inputs, rng=rng).hidden, model.head(params)
    targets, weights = batch['targets'], batch['loss_mask']
    sums = distillation(
        hidden,
        head,
        *teacher.read(inputs),
        targets,
        weights,
        beta=settings.beta,
        temperature=settings.temperature,
        share=settings.weight,
    )
    if rng is not None:
        terms = {'accuracy': sums.correct, 'data_loss': sums.nll, 'divergence': sums.divergence}
        return sums.loss, weights.sum(), terms
    more = functools.partial(by_position.sums, inputs)
    nll, scores = exact_match.score(hidden, head, targets, weights, batch['segment_ids'], rng, more)
    return nll, weights.sum(), {**scores, 'divergence': sums.divergence}


def summarise(sums: dict[str, float], count: float) -> dict[str, float]:
    """Metrics of an evaluation's sums."""
    return {**exact_match.summarise(sums, count), 'divergence': sums['divergence'] / count}


OBJECTIVE = Objective(
    name='distill',
    batch_spec=batch_spec,
    dataset=dataset,
    loss=loss,
    records=RECORDS,
    kinds=('decoder',),
    teacher=Teacher(lambda settings: settings.teacher, 'distill.teacher'),
    summarise=summarise,
    preview=preview,
    prompt_tokens=32,
    titles={'data_loss': 'Loss on the data alone', 'divergence': 'Divergence from the teacher'},
    by_position=True,
)
