"""Masked language modelling: hidden tokens are predicted from both sides (BERT, Devlin et al. 2018, arXiv:1810.04805).

The mask is dynamic (RoBERTa, arXiv:1907.11692): every pass over the data hides other tokens. Held-out rows keep theirs.
"""

import pathlib

import grain
from ml_collections import ConfigDict

from jaxtune.data import open_tokens
from jaxtune.data.masking import Masking
from jaxtune.data.packing import concat_rows, window_rows
from jaxtune.objectives.causal_lm import loss, row

__all__ = ['KINDS', 'dataset', 'loss', 'row']

KINDS = ('encoder',)


def dataset(config: ConfigDict, split: str, tokenizer, cache: pathlib.Path) -> grain.MapDataset:
    """Rows of `data.train` or `data.eval`: the targets are the tokens before some were hidden, and only those count.

    Training with packing cuts the stream of documents every `seq_len` tokens; evaluation cuts each document into
    windows of its own.

    Raises:
      UserError: the tokenizer has no mask token.
    """
    # Held-out rows must not share their masks with those rows of training that have their numbers.
    seed = (config.seed, int(split == 'eval'))
    masking = Masking(tokenizer, config.masked_lm.probability, config.masked_lm.whole_word, seed)
    tokens = open_tokens(config.data[split], split, tokenizer, config, cache)
    if split == 'train' and config.data.packing:
        rows = concat_rows(tokens, config.data.seq_len)
    else:
        rows = window_rows(tokens, config.data.seq_len, config.data.packing)
    return grain.MapDataset.source(rows).map_with_index(masking)
