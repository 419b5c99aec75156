"""`task=export`: a Hugging Face folder from a folder, a hub id, or a training run, finished or not.

With `export.format=gguf` llama.cpp's `model.gguf` is in that folder too.
"""

import dataclasses
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxtune.common import console
from jaxtune.common.io import read_mapping
from jaxtune.common.settings import Settings
from jaxtune.config import is_rewarded
from jaxtune.errors import UserError
from jaxtune.methods import METHODS, apply, peft
from jaxtune.parallel import make_mesh
from jaxtune.pretrained import gguf_file
from jaxtune.pretrained.load import ModelBundle, load_model
from jaxtune.pretrained.save import merged, save
from jaxtune.recipe import recipes
from jaxtune.recipe.flags import Command
from jaxtune.recipe.workdir import write_result
from jaxtune.tasks import evaluate, pipeline, setup, specs
from jaxtune.training.checkpoint import Checkpoints
from jaxtune.training.evaluator import Evaluator
from jaxtune.weights import merge_weights, tree


def check(config: Settings, mesh: Mesh) -> None:
    """Refuses what the recipe alone shows to be wrong.

    Raises:
      UserError: no model is named, no data to tell what rounding costs, or a package is missing.
    """
    if not config.model.path:
        raise UserError("model.path='': expected a Hugging Face folder, a hub id or a jaxtune workdir to export")
    if config.export.requantise and not config.data.eval:
        raise UserError("data.eval='': export.requantise=True needs held-out data, to tell what rounding again costs")
    if config.export.format == 'gguf':
        gguf_file.package()
    elif config.export.quantise:
        raise UserError(f'export.quantise={config.export.quantise}: expected export.format=gguf with it')
    if specs.scores_export(config):
        evaluate.check(config, mesh)


def unfinished(source: pathlib.Path) -> bool:
    """Whether a folder is the workdir of a run that has checkpoints and no model yet."""
    ended = (source / 'export' / 'config.json').is_file() or peft.is_adapter(source / 'adapter')
    return (source / 'checkpoints').is_dir() and not ended


def run(config: Settings, workdir: pathlib.Path, command: Command) -> dict[str, Any]:
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
            bundle, step = from_checkpoint(source, mesh)
        else:
            bundle, step = load_model(specs.model_spec(config), mesh), 0
        as_gguf = config.export.format == 'gguf'
        if as_gguf:
            gguf_file.check(bundle.model, bundle.tokenizer)
        params, metrics = merged(bundle.params, f'model.path={source}'), {}
        bundle = dataclasses.replace(bundle, params=params)
        evaluator = evaluate.open_evaluator(config, workdir, mesh, bundle) if specs.scores_export(config) else None
        if config.export.requantise:
            assert evaluator is not None  # `scores_export` says so
            params, metrics = _requantised(config, evaluator, bundle, params)
        if as_gguf and evaluator is not None:
            metrics['eval/loss'] = evaluate.score(evaluator, params)['eval/loss']
        folder, quantise = workdir / 'export', config.export.quantise if as_gguf else None
        save(folder, bundle.model, params, bundle.tokenizer, bundle.folder, config.export.dtype, quantise)
        metrics |= {'export/parameters': tree.count(params), 'export/bytes': tree.nbytes(params)}
        if as_gguf:
            metrics['export/gguf_bytes'] = (folder / gguf_file.NAME).stat().st_size
        if as_gguf and evaluator is not None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
            read = gguf_file.load(folder / gguf_file.NAME, bundle.model, shardings)
            metrics['eval/loss_gguf'] = evaluate.score(evaluator, read)['eval/loss']
    if not console.is_primary():
        return {'task': 'export', 'status': 'done', 'step': step, 'metrics': metrics}
    console.note(f'made {workdir}/export: a Hugging Face folder of {metrics["export/parameters"]:,} parameters')
    if as_gguf:
        _note_gguf(folder / gguf_file.NAME, config.export.quantise, metrics)
    return write_result(workdir, 'export', step, metrics)


def _note_gguf(path: pathlib.Path, quantise: str, metrics: dict[str, Any]) -> None:
    size, kind = metrics['export/gguf_bytes'], f'{quantise}, ' if quantise else ''
    console.note(f'made {path}: {kind}{8 * size / metrics["export/parameters"]:.2f} bits a parameter')
    if 'eval/loss_gguf' in metrics:
        before, after = metrics['eval/loss'], metrics['eval/loss_gguf']
        console.note(f'held-out loss {before:.4f}, of model.gguf {after:.4f} ({after - before:+.4f})')


def _requantised(config: Settings, evaluator: Evaluator, bundle: ModelBundle, params: Any) -> tuple[Any, dict]:
    """Merged parameters with the kernels that QLoRA stores rounded to NF4 once more, and what that does to the loss.

    A light tuning moves weights by less than NF4's steps, and is lost.
    """
    before = evaluate.score(evaluator, params)['eval/loss']
    codecs = METHODS.get('qlora').codecs(bundle.model, config.method)
    rounded = jax.jit(lambda params: merge_weights(apply.encoded(params, codecs)))(params)
    after = evaluate.score(evaluator, rounded)['eval/loss']
    console.note(f'held-out loss {before:.4f} merged, {after:.4f} rounded to NF4 again ({after - before:+.4f})')
    return rounded, {'export/loss_merged': before, 'export/loss_requantised': after}


def stored_recipe(source: pathlib.Path) -> Settings:
    """The recipe of the run in a workdir.

    Raises:
      UserError: there is none.
    """
    stored = read_mapping(source / 'config.json')
    if stored is None:
        raise UserError(f'model.path={source}: expected a jaxtune workdir with config.json')
    recipe = recipes.defaults()
    recipes.apply_overrides(recipe, recipes.flatten(ConfigDict(stored, type_safe=False)))
    return pipeline.point_to_stages(recipe, source.parent)


def from_checkpoint(source: pathlib.Path, mesh: Mesh) -> tuple[ModelBundle, int]:
    """A run's model with the parameters of its newest checkpoint, and that checkpoint's step.

    Raises:
      UserError: the run has saved none yet.
    """
    recipe = stored_recipe(source)
    better = setup.higher_is_better(recipe, recipe.eval.metric)
    folder, keep = source / 'checkpoints', recipe.checkpoint.keep
    checkpoints = Checkpoints(folder, keep, recipe.eval.metric, better, read_only=True)
    if checkpoints.newest() is None:
        raise UserError(f'model.path={source}: the run has saved no checkpoint yet')
    bundle = load_model(specs.model_spec(recipe), mesh)
    trainable, frozen = setup.split(recipe, bundle)
    rewarded = is_rewarded(recipe.task)
    learning = specs.bound_algorithm(recipe) if rewarded else specs.objective(recipe)
    program = setup.program(recipe, mesh, bundle, trainable, learning, max(1, recipe.train.steps))
    restored = checkpoints.restore_newest(program.shapes, program.placed)
    assert restored is not None  # there is a newest one
    step, state, _ = restored
    checkpoints.close()
    return dataclasses.replace(bundle, params=tree.combine(state['trainable'], frozen)), step
