"""`task=export`: a Hugging Face folder from a folder, a hub id, or a training run, finished or not."""

import dataclasses
import pathlib
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxtune import methods
from jaxtune.common import console
from jaxtune.common.io import read_json
from jaxtune.errors import UserError
from jaxtune.methods import apply, peft
from jaxtune.models import hf, value_head
from jaxtune.models.model import leaf_paths
from jaxtune.parallel import make_mesh
from jaxtune.pretrained import companions
from jaxtune.pretrained.load import Assembly, assemble
from jaxtune.recipe import recipes
from jaxtune.recipe.workdir import write_result
from jaxtune.tasks import evaluate
from jaxtune.training.checkpoint import Checkpoints
from jaxtune.training.evaluator import rises
from jaxtune.training.program import make_program
from jaxtune.weights import LoRA, materialise, tree


def check(config: ConfigDict, mesh: Mesh) -> None:
    """Refuses what the recipe alone shows to be wrong.

    Raises:
      UserError: no model is named, or no data to tell what rounding costs.
    """
    if not config.model.path:
        raise UserError("model.path='': expected a Hugging Face folder, a hub id or a jaxtune workdir to export")
    if config.export.requantise and not config.data.eval:
        raise UserError("data.eval='': export.requantise=True needs held-out data, to tell what rounding again costs")


def unfinished(source: pathlib.Path) -> bool:
    """Whether a folder is the workdir of a run that has checkpoints and no model yet."""
    ended = (source / 'export' / 'config.json').is_file() or peft.is_adapter(source / 'adapter')
    return (source / 'checkpoints').is_dir() and not ended


def run(config: ConfigDict, workdir: pathlib.Path, command) -> dict:
    """Writes `export/`; returns `result.json`'s content.

    `model.path` is a folder, a hub id or a workdir; of a run that has not finished, its newest checkpoint is taken.

    Raises:
      UserError: there is no such model.
    """
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    source = pathlib.Path(config.model.path)
    with jax.set_mesh(mesh):
        if unfinished(source):
            parts, step = from_checkpoint(source, mesh)
        else:
            parts, step = assemble(config, mesh), 0
        params, metrics = merged(parts.params, f'model.path={source}'), {}
        if config.export.requantise:
            params, metrics = _requantised(config, workdir, mesh, dataclasses.replace(parts, params=params))
        save(workdir / 'export', parts.model, params, parts.tokenizer, parts.folder, config.export.dtype)
    metrics |= {'export/parameters': tree.count(params), 'export/bytes': tree.nbytes(params)}
    if not console.is_primary():
        return {'task': 'export', 'status': 'done', 'step': step, 'metrics': metrics}
    console.note(f'made {workdir}/export: a Hugging Face folder of {metrics["export/parameters"]:,} parameters')
    return write_result(workdir, 'export', step, metrics)


def _requantised(config: ConfigDict, workdir: pathlib.Path, mesh: Mesh, parts: Assembly) -> tuple[Any, dict]:
    """Merged parameters with the kernels that QLoRA stores rounded to NF4 once more, and what that does to the loss.

    A light tuning moves weights by less than NF4's steps, and is lost.
    """
    evaluator = evaluate.open_evaluator(config, workdir, mesh, parts)
    before = evaluate.score(evaluator, parts.params)['eval/loss']
    codecs = methods.get('qlora').codecs(parts.model, config.method)
    rounded = jax.jit(lambda params: methods.get('qlora').merge(apply.encoded(params, codecs)))(parts.params)
    after = evaluate.score(evaluator, rounded)['eval/loss']
    console.note(f'held-out loss {before:.4f} merged, {after:.4f} rounded to NF4 again ({after - before:+.4f})')
    return rounded, {'export/loss_merged': before, 'export/loss_requantised': after}


def save(path: pathlib.Path, model, params, tokenizer, folder: str, dtype: str = 'auto') -> None:
    """Writes a Hugging Face folder: weights, config, tokenizer, and what the folder it came from had beside them.

    Args:
      path: where to.
      model: the model.
      params: its parameters, plain arrays.
      tokenizer: what it was trained with.
      folder: where it began; '' = from scratch.
      dtype: of the weights; `auto` = as that folder keeps them, and never wider than they are here.
    """
    leaves = leaf_paths(params)
    if dtype != 'auto':
        dtypes = dict.fromkeys(leaves, np.dtype(dtype))
    else:
        stored = hf.stored_dtypes(folder, model) if folder else {}
        narrower = {path for path, kept in stored.items() if kept.itemsize < leaves[path].dtype.itemsize}
        dtypes = {path: stored[path] for path in narrower}
    hf.save(path, model, params, add_files=lambda new: companions.write(new, tokenizer, folder), dtypes=dtypes)


def save_tuned(workdir: pathlib.Path, config: ConfigDict, parts: Assembly, params) -> None:
    """Writes what a method trained: `adapter/`, and merged into the model `export/` where that can be.

    A base that was made from scratch is written to `base/`: an adapter is of no use without it.
    """
    method = methods.get(config.method.name)
    model, folder = parts.model, parts.folder
    save_adapter = _ADAPTERS.get(config.method.name)
    if save_adapter:
        base = folder
        if not folder:
            base = str(workdir / 'base')
            save(workdir / 'base', model, _plain_base(params, model), parts.tokenizer, '')
        whole = apply.whole_paths(params, method, parts.whole)
        save_adapter(workdir / 'adapter', params, model, config.method, base, whole)
        if console.is_primary():
            parts.tokenizer.save_pretrained(str(workdir / 'adapter'))  # whose template the adapter answers to
    if getattr(method, 'MERGES', True):
        save(workdir / 'export', model, method.merge(params), parts.tokenizer, folder, config.export.dtype)


_ADAPTERS = {
    'lora': peft.save_lora,
    'qlora': peft.save_lora,
    'adapter': peft.save_bottleneck,
    'prompt': peft.save_prompt,
}


def _plain_base(params, model):
    """The model's own parameters without what a method added."""
    leaves = leaf_paths(params)
    bases = {path: leaves[path].base if isinstance(leaves[path], LoRA) else leaves[path] for path in model.tensors}
    return tree.nested({path: materialise(leaf) for path, leaf in bases.items()})


def merged(params, where: str):
    """Plain arrays of the model's own, updates added.

    Raises:
      UserError: something was added that cannot be merged.
    """
    if any(re.search(r'_adapter/|^prompt/|/prefix/', path) for path in leaf_paths(params)):
        raise UserError(
            f'{where}: bottleneck adapters, prompts and prefixes cannot be merged into a model; expected LoRA, or '
            'task=generate or evaluate with the adapter itself'
        )
    return methods.get('lora').merge(value_head.policy(params))


def stored_recipe(source: pathlib.Path) -> ConfigDict:
    """The recipe of the run in a workdir.

    Raises:
      UserError: there is none.
    """
    stored = read_json(source / 'config.json')
    if stored is None:
        raise UserError(f'model.path={source}: expected a jaxtune workdir with config.json')
    recipe = recipes.defaults()
    recipes.apply_overrides(recipe, recipes.flatten(ConfigDict(stored, type_safe=False)))
    return recipes.point_to_stages(recipe, source.parent)


def from_checkpoint(source: pathlib.Path, mesh: Mesh) -> tuple[Assembly, int]:
    """A run's model with the parameters of its newest checkpoint, and that checkpoint's step.

    Raises:
      UserError: the run has saved none yet.
    """
    recipe = stored_recipe(source)
    checkpoints = Checkpoints(
        source / 'checkpoints', recipe.checkpoint.keep, recipe.eval.metric, rises(recipe.eval.metric), read_only=True
    )
    if checkpoints.newest() is None:
        raise UserError(f'model.path={source}: the run has saved no checkpoint yet')
    parts = assemble(recipe, mesh)
    trainable, frozen = apply.partition(recipe, parts.params, parts.whole)
    program = make_program(recipe, mesh, parts.model, trainable, max(1, recipe.train.steps), parts.fresh)
    step, state, _ = checkpoints.restore_newest(program.shapes, program.placed)
    checkpoints.close()
    return dataclasses.replace(parts, params=tree.combine(state['trainable'], frozen)), step
