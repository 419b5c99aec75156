"""Training objectives: how examples become a batch, and a loss as sums. A new one is a module here and a line below.

An objective is a module with

- `row(config) -> {field: jax.ShapeDtypeStruct}`: what one row of a batch holds;
- `dataset(config, split, tokenizer, cache) -> rows`: numbered dicts of arrays, a `grain` source or `MapDataset`;
- `loss(model, params, batch, rng) -> (sum, count, metrics)`: the summed loss and the number of what it was summed over
  (float32 scalars), so that accumulation and many devices give exactly the big batch's mean; `metrics` are further sums
  over the same count (`accuracy`: correct predictions);

and may hold

- `KINDS`: the kinds of model that it suits (`decoder`, `encoder`, `encdec`); without it, all;
- `HEAD`: what follows the model's last layer, where not a language model's head (`classification`), and with it
  `label_fields(config) -> fields`: Hugging Face's `id2label` and `label2id`;
- `spare_tokens(config, tokenizer) -> int`: how many ids the model must have beyond the tokenizer's.
"""

import importlib
from types import ModuleType

from jaxtune.errors import UserError

OBJECTIVES = {
    'causal_lm': 'jaxtune.objectives.causal_lm',
    'masked_lm': 'jaxtune.objectives.masked_lm',
    'span_corruption': 'jaxtune.objectives.span_corruption',
    'seq2seq': 'jaxtune.objectives.seq2seq',
    'classification': 'jaxtune.objectives.classification',
}


def get(name: str) -> ModuleType:
    """The module of an objective.

    Raises:
      UserError: this version does not have it.
    """
    if name not in OBJECTIVES:
        raise UserError(f'objective={name!r}: not in this version; expected one of {", ".join(OBJECTIVES)}')
    return importlib.import_module(OBJECTIVES[name])
