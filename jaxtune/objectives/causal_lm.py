"""Causal language modelling: every token predicts the next one of its document (GPT, Radford et al. 2018)."""

import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxtune.data import open_tokens
from jaxtune.data.packing import Rows, concat_rows, window_rows
from jaxtune.objectives.cross_entropy import cross_entropy

KINDS = ('decoder',)


def row(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """What one row of a batch holds."""
    shape = (config.data.seq_len,)
    dtypes = dict.fromkeys(('tokens', 'targets', 'positions', 'segment_ids'), np.int32) | {'weights': np.float32}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}


def dataset(config: ConfigDict, split: str, tokenizer, cache: pathlib.Path) -> Rows:
    """Rows of `data.train` or `data.eval`.

    Training with packing cuts the stream of documents every `seq_len` tokens; evaluation cuts each document into
    windows of its own, so that the loss of a document does not depend on its neighbours.
    """
    tokens = open_tokens(config.data[split], split, tokenizer, config, cache)
    if split == 'train' and config.data.packing:
        return concat_rows(tokens, config.data.seq_len)
    return window_rows(tokens, config.data.seq_len, config.data.packing)


def loss(config, model, params, batch, rng):
    """Summed negative log-likelihood of the targets in nats, their number, and how many were predicted right."""
    outputs = model.apply(params, batch, rng=rng)
    nll, correct = cross_entropy(outputs.hidden, model.head(params), batch['targets'], batch['weights'])
    return nll, batch['weights'].sum(), {'accuracy': correct}
