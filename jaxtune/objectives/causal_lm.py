"""Causal language modelling: every token predicts the next one of its document (GPT, Radford et al. 2018).

Of conversations, what the assistant writes is trained, as `sft` does.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.common import console
from jaxtune.common.settings import Settings
from jaxtune.data import formats, open_tokens
from jaxtune.data.conversations import holds_conversations, rows_of
from jaxtune.data.documents import TEXTS
from jaxtune.data.examples import ExampleRows, recordwise
from jaxtune.data.holdout import Recordwise
from jaxtune.data.packing import Rows, concat_rows, window_rows
from jaxtune.data.spec import DataSpec
from jaxtune.models import Model
from jaxtune.objectives import Batch, Objective, Sums, by_position
from jaxtune.objectives.cross_entropy import cross_entropy, token_scores


def batch_spec(settings: Settings, data: DataSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds."""
    shape = (data.seq_len,)
    dtypes = dict.fromkeys(('tokens', 'targets', 'positions', 'segment_ids'), np.int32) | {'loss_mask': np.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}


_CONVERSATIONS = recordwise('conversations', formats.CHATS)
RECORDS = Recordwise(
    'texts or conversations',
    lambda data, key: (_CONVERSATIONS if holds_conversations(data, 'train') else TEXTS).open(data, key),
    lambda data, record: (TEXTS if isinstance(record, dict) and data.text_key in record else _CONVERSATIONS).content(
        data, record
    ),
)


def dataset(settings: Settings, data: DataSpec, split: str, tokenizer: Any, cache: pathlib.Path) -> Rows | ExampleRows:
    """Rows of `data.train` or `data.eval`.

    Training with packing cuts the stream of documents every `seq_len` tokens; evaluation cuts each document into
    windows of its own, so that the loss of a document does not depend on its neighbours.
    """
    if holds_conversations(data, split):
        console.note(f'data.{split}={data.path(split)}: holds conversations, of which the answers are trained')
        return rows_of(data, split, tokenizer, cache)
    tokens = open_tokens(data, split, tokenizer, cache)
    if split == 'train' and data.packing:
        return concat_rows(tokens, data.seq_len)
    return window_rows(tokens, data.seq_len, data.packing)


def loss(settings: Settings, model: Model, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
    """Summed negative log-likelihood of the targets in nats, their number, and how many were predicted right."""
    hidden, head = model.apply(params, batch, rng=rng).hidden, model.head(params)
    targets, weights = batch['targets'], batch['loss_mask']
    if by_position.EDGES not in batch:
        nll, correct = cross_entropy(hidden, head, targets, weights)
        return nll, weights.sum(), {'accuracy': correct}
    logprobs, right = token_scores(hidden, head, jnp.where(weights > 0, targets, 0))
    sums = {'accuracy': (weights * right).sum(), **by_position.sums(batch, logprobs)}
    return -(weights * logprobs).sum(), weights.sum(), sums


OBJECTIVE = Objective(
    name='causal_lm',
    batch_spec=batch_spec,
    dataset=dataset,
    loss=loss,
    records=RECORDS,
    kinds=('decoder',),
    prompt_tokens=32,
    by_position=True,
)
