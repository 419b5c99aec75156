"""`task=export`: a Hugging Face folder from a folder, a hub id, or a training run, finished or not."""

import pathlib

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxtune import console, methods, recipes
from jaxtune.assemble import assemble, open_model, tokenizer_folder
from jaxtune.checkpoint import Checkpoints
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.spans import end_of_turn
from jaxtune.data.templates import open_template
from jaxtune.errors import UserError
from jaxtune.evaluation import rises
from jaxtune.models import hf
from jaxtune.parallel import make_mesh
from jaxtune.program import abstract_params, make_program
from jaxtune.weights import tree
from jaxtune.workdir import read_json, write_json, write_result


def run(config: ConfigDict, workdir: pathlib.Path, command) -> dict:
    """Writes `export/`; returns `result.json`'s content.

    `model.path` is a folder, a hub id or a workdir; of a run that has not finished, its newest checkpoint is taken.

    Raises:
      UserError: there is no such model.
    """
    if not config.model.path:
        raise UserError("model.path='': expected a Hugging Face folder, a hub id or a jaxtune workdir to export")
    mesh = make_mesh(config.mesh)
    source = pathlib.Path(config.model.path)
    with jax.set_mesh(mesh):
        if (source / 'checkpoints').is_dir() and not (source / 'export' / 'config.json').is_file():
            model, params, tokenizer, folder, step = from_checkpoint(source, config, mesh)
        else:
            parts = assemble(config, mesh)
            model, params, tokenizer, folder, step = parts.model, parts.params, parts.tokenizer, parts.folder, 0
        save(workdir / 'export', model, params, tokenizer, folder)
    metrics = {'export/parameters': tree.count(params), 'export/bytes': tree.nbytes(params)}
    if not console.is_primary():
        return {'task': 'export', 'status': 'done', 'step': step, 'metrics': metrics}
    console.note(f'made {workdir}/export: a Hugging Face folder of {metrics["export/parameters"]:,} parameters')
    return write_result(workdir, 'export', step, metrics)


def save(path: pathlib.Path, model, params, tokenizer, folder: str) -> None:
    """Writes a Hugging Face folder: weights, config, tokenizer, and what the folder it came from had beside them."""

    def add(new: pathlib.Path) -> None:
        tokenizer.save_pretrained(new)
        if tokenizer.chat_template:
            _stop_after_turns(new / 'generation_config.json', tokenizer)

    hf.save(path, model, params, extra_files_from=folder or None, add_files=add)


def _stop_after_turns(path: pathlib.Path, tokenizer) -> None:
    """Lets `transformers`' generation stop where the chat template ends an answer, too."""
    end = end_of_turn(open_template('auto', tokenizer), tokenizer)
    values = read_json(path) or {}
    eos = values.get('eos_token_id')
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if end is not None and end not in ends:
        write_json(path, values | {'eos_token_id': [*ends, end] if ends else end})


def from_checkpoint(source: pathlib.Path, config: ConfigDict, mesh: Mesh):
    """Model, merged parameters, tokenizer, origin and step of a run's newest checkpoint.

    Raises:
      UserError: the run has saved none yet.
    """
    stored = read_json(source / 'config.json')
    if stored is None:
        raise UserError(f'model.path={source}: expected a jaxtune workdir with config.json')
    recipe = recipes.defaults()
    recipes.lay_over(recipe, recipes.flatten(ConfigDict(stored, type_safe=False)))
    recipe = recipes.point_to_stages(recipe, source.parent)
    tokenizer = tokenizers.load(tokenizer_folder(recipe))
    model, folder = open_model(recipe, tokenizer)
    method = methods.get(recipe.method.name)
    trainable, frozen = abstract_params(recipe, mesh, model)
    program = make_program(recipe, mesh, model, trainable, max(1, recipe.train.steps))
    checkpoints = Checkpoints(
        source / 'checkpoints', recipe.checkpoint.keep, recipe.eval.metric, rises(recipe.eval.metric)
    )
    step = checkpoints.newest()
    if step is None:
        raise UserError(f'model.path={source}: the run has saved no checkpoint yet')
    state, _ = checkpoints.restore(step, program.shapes, program.placed)
    checkpoints.close()
    params = method.merge(tree.combine(state['trainable'], frozen))
    return model, params, tokenizer, folder, step
