"""Training objectives: how examples become a batch, and a loss as sums. A new one is a module here and a line below.

An objective is a module with

- `row(config) -> {field: jax.ShapeDtypeStruct}`: what one row of a batch holds;
- `dataset(config, split, tokenizer, cache) -> rows`: numbered dicts of arrays, a `grain` source or `MapDataset`;
- `loss(config, model, params, batch, rng) -> (sum, count, metrics)`: the summed loss and the number of what it was
  summed over (float32 scalars), so that accumulation and many devices give exactly the big batch's mean; `metrics` are
  further sums over the same count (`accuracy`: correct predictions), or pairs of a sum and a count of its own; `rng` is
  None in evaluation: nothing is drawn;

and may hold

- `KINDS`: the kinds of model that it suits (`decoder`, `encoder`, `encdec`); without it, all;
- `HEAD`: what follows the model's last layer, where not a language model's head (`classification`), and with it
  `label_fields(config) -> fields`: Hugging Face's `id2label` and `label2id`;
- `spare_tokens(config, tokenizer) -> int`: how many ids the model must have beyond the tokenizer's;
- `SEQUENCES`: how many rows of the model one row of a batch is, where not one;
- `COUNTED`: what the count of its loss counts, where not tokens (`pairs`);
- `complete(config, rows, model, params, mesh, cache, split) -> rows`: rows with what only the model at the start of
  training can tell of them;
- `summarise(sums, count) -> metrics`: what evaluation makes of its metrics' sums, where not their means;
- `statistics(config) -> function`, or None: `(model, params, batch) -> {name: (sum, count)}` of what the loss must know
  of the whole batch (in evaluation: of all held-out rows) before it; it finds the means in its batch, by these names,
  and no gradient goes through them;
- `preview(rows, tokenizer) -> [(text, trained)]`: an example as the model will see it, shown before training;

Its rows may have `facts` (counts, for the log) and `baselines` (metrics that need no model, to compare with).
"""

import functools
import importlib
from types import ModuleType

from jaxtune.errors import UserError

OBJECTIVES = {
    'causal_lm': 'jaxtune.objectives.causal_lm',
    'masked_lm': 'jaxtune.objectives.masked_lm',
    'span_corruption': 'jaxtune.objectives.span_corruption',
    'seq2seq': 'jaxtune.objectives.seq2seq',
    'classification': 'jaxtune.objectives.classification',
    'sft': 'jaxtune.objectives.sft',
    'reward': 'jaxtune.objectives.reward',
    'dpo': 'jaxtune.objectives.dpo',
}


def get(name: str) -> ModuleType:
    """The module of an objective.

    Raises:
      UserError: this version does not have it.
    """
    if name not in OBJECTIVES:
        raise UserError(f'objective={name!r}: not in this version; expected one of {", ".join(OBJECTIVES)}')
    return importlib.import_module(OBJECTIVES[name])


def statistics(objective: ModuleType, config, model):
    """An objective's `(params, batch) -> {name: (sum, count)}` of this model; None where it has none."""
    make = getattr(objective, 'statistics', None)
    found = make(config) if make else None
    return None if found is None else functools.partial(found, model)


def complete(config, rows, model, params, mesh, cache, split):
    """The rows with what their objective asks the model about them before training; most ask nothing.

    Args:
      config: the recipe.
      rows: of `dataset`.
      model: the model.
      params: its parameters at the start.
      mesh: where they are.
      cache: folder in the workdir; what was asked once is found there.
      split: `train` or `eval`.
    """
    function = getattr(get(config.objective), 'complete', None)
    return rows if function is None else function(config, rows, model, params, mesh, cache, split)
