"""A Hugging Face folder of a model, and what a tuning method trained beside one."""

import pathlib
import re
from typing import Any

import numpy as np

from jaxtune.common import console
from jaxtune.errors import UserError
from jaxtune.methods import BoundMethod, apply, peft_tokens
from jaxtune.models import Model, hf, value_head
from jaxtune.models.model import leaf_paths
from jaxtune.pretrained import companions, gguf_file, overrides
from jaxtune.pretrained.load import ModelBundle
from jaxtune.weights import is_weight, materialise, merge_weights, tree


def save(
    path: pathlib.Path,
    model: Model,
    params: Any,
    tokenizer: Any,
    folder: str,
    dtype: str = 'auto',
    gguf: str | None = None,
) -> None:
    """Writes a Hugging Face folder: weights, config, tokenizer, and what the folder it came from had beside them.

    Args:
      path: where to.
      model: the model.
      params: its parameters, plain arrays.
      tokenizer: what it was trained with.
      folder: where it began; '' = from scratch.
      dtype: of the weights; `auto` = as that folder keeps them, and never wider than they are here.
      gguf: how `model.gguf` beside them is quantised, '' = not at all; None = there is none.
    """
    leaves = leaf_paths(params)

    def add_files(new: pathlib.Path) -> None:
        companions.write(new, tokenizer, folder)
        if gguf is not None:
            gguf_file.write(new, model, tokenizer, gguf, pathlib.Path(folder).name)

    if dtype != 'auto':
        dtypes = dict.fromkeys(leaves, np.dtype(dtype))
    else:
        stored = hf.stored_dtypes(folder, model) if folder else {}
        narrower = {
            path for path, stored_dtype in stored.items() if stored_dtype.itemsize < leaves[path].dtype.itemsize
        }
        dtypes = {path: stored[path] for path in narrower}
    hf.save(path, model, params, add_files=add_files, dtypes=dtypes)


def save_tuned(workdir: pathlib.Path, method: BoundMethod, bundle: ModelBundle, params: Any, dtype: str) -> None:
    """Writes what a method trained: `adapter/`, and merged into the model `export/` where that can be.

    A base that was made from scratch is written to `base/`: an adapter is of no use without it.

    Args:
      workdir: where to.
      method: what trained.
      bundle: model and tokenizer.
      params: the whole tree.
      dtype: of exported weights, as for `save`.
    """
    model, folder = bundle.model, bundle.folder
    if method.method.save_adapter:
        base = folder
        if not folder:
            base = str(workdir / 'base')
            save(workdir / 'base', model, _plain_base(params, model), bundle.tokenizer, '')
        whole = apply.whole_paths(params, method.method, bundle.trained_whole)
        method.method.save_adapter(workdir / 'adapter', params, model, method.settings, base, whole)
        if resize := peft_tokens.resizing(leaf_paths(params)):
            console.note(f'to load {workdir}/adapter with PEFT, first resize the base: {resize}')
        if console.is_primary():
            bundle.tokenizer.save_pretrained(str(workdir / 'adapter'))  # whose template the adapter answers to
            overrides.keep(workdir / 'adapter', bundle.overrides, base)
    if method.method.merges:
        save(workdir / 'export', model, method.method.merge(params), bundle.tokenizer, folder, dtype)


def _plain_base(params: Any, model: Model) -> Any:
    """The model's own parameters without what a method added."""
    leaves = leaf_paths(params)
    originals = {path: leaves[path].original if is_weight(leaves[path]) else leaves[path] for path in model.tensors}
    return tree.nested({path: materialise(leaf) for path, leaf in originals.items()})


def merged(params: Any, where: str) -> Any:
    """Plain arrays of the model's own, updates added.

    Raises:
      UserError: something was added that cannot be merged.
    """
    if any(re.search(r'_adapter/|^prompt/|/prefix/', path) for path in leaf_paths(params)):
        raise UserError(
            f'{where}: bottleneck adapters, prompts and prefixes cannot be merged into a model; expected LoRA, or '
            'task=generate or evaluate with the adapter itself'
        )
    return merge_weights(value_head.policy(params))
