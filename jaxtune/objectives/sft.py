"""Instruction tuning: from a conversation's prompt the model learns the answers (Ouyang et al. 2022, arXiv:2203.02155).

Only the tokens that the assistant writes are scored, with the one that ends its turn. Plain texts (`data.format=text`,
or a source of texts beside conversations) are scored whole, as `causal_lm` does.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.common.settings import Settings
from jaxtune.data import formats
from jaxtune.data.conversations import rows_of
from jaxtune.data.examples import ExampleRows, is_text, pieces, recordwise
from jaxtune.data.packing import Rows
from jaxtune.data.spec import DataSpec
from jaxtune.models import Model
from jaxtune.objectives import Batch, Objective, Sums, by_position, causal_lm
from jaxtune.objectives.causal_lm import batch_spec
from jaxtune.objectives.exact_match import score, summarise

RECORDS = recordwise('conversations', formats.CHATS)


def dataset(settings: Settings, data: DataSpec, split: str, tokenizer: Any, cache: pathlib.Path) -> ExampleRows | Rows:
    """Rows of `data.train` or `data.eval`: conversations of at most `seq_len` tokens, packed or one a row.

    The template becomes the tokenizer's own.

    Raises:
      UserError: no such data, conversations that are none (with `file:line` and a count), or a template that fails.
    """
    if is_text(data, split):
        return causal_lm.dataset(settings, data, split, tokenizer, cache)
    return rows_of(data, split, tokenizer, cache, settings.train_on)


def loss(settings: Settings, model: Model, params: Any, batch: Batch, rng: jax.Array | None) -> Sums:
    """Summed negative log-likelihood of the answers' tokens in nats, their number, and sums for `summarise`."""
    if settings.neftune_alpha and rng is not None:
        rng, key = jax.random.split(rng)
        noise = neftune(key, batch['segment_ids'], model.config.d_model, settings.neftune_alpha)
        batch = {**batch, 'noise': noise}
    outputs = model.apply(params, batch, rng=rng)
    weights = batch['loss_mask']
    more = functools.partial(by_position.sums, batch)
    nll, sums = score(outputs.hidden, model.head(params), batch['targets'], weights, batch['segment_ids'], rng, more)
    return nll, weights.sum(), sums


def neftune(key: jax.Array, segment_ids: jax.Array, d_model: int, alpha: float) -> jax.Array:
    """NEFTune's noise on embeddings (Jain et al. 2023, arXiv:2310.05914).

    Args:
      key: a random key.
      segment_ids: `[batch, length]`, 0 = padding; a packed example's noise is scaled by its own length.
      d_model: width of the embeddings.
      alpha: the paper's.

    Returns:
      `[batch, length, d_model]`: uniform in `±alpha / sqrt(length of the segment * d_model)`, 0 on padding.
    """
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids > 0)[:, None, :]
    lengths = jnp.maximum(same.sum(-1), 1)
    scale = jnp.where(segment_ids > 0, alpha / jnp.sqrt(lengths * d_model), 0.0)
    return jax.random.uniform(key, (*segment_ids.shape, d_model), minval=-1.0, maxval=1.0) * scale[..., None]


def preview(rows: ExampleRows | Rows, tokenizer: Any) -> list[tuple[str, bool]]:
    """The first example as text, in runs of trained tokens and others."""
    if isinstance(rows, Rows):
        ids = np.asarray(rows.tokens.document(0)[: rows.seq_len])
        return pieces(tokenizer, ids, np.arange(len(ids)) > 0)
    example = rows.examples[0]
    assistant_mask = example.assistant_mask.copy()
    assistant_mask[:1] = False  # no position predicts it
    return pieces(tokenizer, example.ids, assistant_mask)


OBJECTIVE = Objective(
    name='sft',
    batch_spec=batch_spec,
    dataset=dataset,
    loss=loss,
    records=RECORDS,
    kinds=('decoder',),
    summarise=summarise,
    preview=preview,
    prompt_tokens=0,
    by_position=True,
)
