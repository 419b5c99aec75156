"""Masked language modelling: hidden tokens are predicted from both sides (BERT, Devlin et al. 2018, arXiv:1810.04805).

The mask is dynamic (RoBERTa, arXiv:1907.11692): every pass over the data hides other tokens. Held-out rows keep theirs.
"""

import pathlib
from typing import Any

import grain

from jaxtune.common.settings import Settings
from jaxtune.data import open_tokens
from jaxtune.data.documents import TEXTS
from jaxtune.data.masking import Masking
from jaxtune.data.packing import concat_rows, window_rows
from jaxtune.data.spec import DataSpec
from jaxtune.objectives import Objective
from jaxtune.objectives.causal_lm import batch_spec, loss


def dataset(settings: Settings, data: DataSpec, split: str, tokenizer: Any, cache: pathlib.Path) -> grain.MapDataset:
    """Rows of `data.train` or `data.eval`: the targets are the tokens before some were hidden, and only those count.

    Training with packing cuts the stream of documents every `seq_len` tokens; evaluation cuts each document into
    windows of its own.

    Raises:
      UserError: the tokenizer has no mask token.
    """
    # Held-out rows must not share their masks with those rows of training that have their numbers.
    seed = (data.seed, int(split == 'eval'))
    masking = Masking(tokenizer, settings.probability, settings.whole_word, seed, data.vocab_size)
    tokens = open_tokens(data, split, tokenizer, cache)
    if split == 'train' and data.packing:
        rows = concat_rows(tokens, data.seq_len)
    else:
        rows = window_rows(tokens, data.seq_len, data.packing)
    return grain.MapDataset.source(rows).map_with_index(masking)


OBJECTIVE = Objective(
    name='masked_lm',
    batch_spec=batch_spec,
    dataset=dataset,
    loss=loss,
    records=TEXTS,
    kinds=('encoder',),
    auto_class='MaskedLM',
)
