"""`--check`: everything that a recipe names is read and checked, and nothing is trained or written.

Of weights only the headers are read, so that a large model takes no more memory than a small one.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxtune import objectives
from jaxtune.common.formatting import amount
from jaxtune.config import REWARDED
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.inputs import fingerprints
from jaxtune.data.prepare import streaming
from jaxtune.data.records import open_records
from jaxtune.errors import UserError
from jaxtune.generation.generator import Completer
from jaxtune.generation.prompts import read_prompts
from jaxtune.methods import apply
from jaxtune.parallel import make_mesh
from jaxtune.pretrained import load
from jaxtune.recipe import ownership, recipes, workdir  # fmt: skip
from jaxtune.recipe.flags import Command
from jaxtune.rl import trainer
from jaxtune.rl.rewards import open_reward
from jaxtune.tasks import compile, evaluate, export, generate, prepare, train
from jaxtune.training import sample_callback
from jaxtune.training.program import make_program
from jaxtune.weights import tree


def check(command: Command) -> str:
    """Checks every stage of a recipe, as far as what it reads is there.

    Returns:
      What was checked, in a line.

    Raises:
      UserError: something is wrong.
    """
    said = []
    for name, config in command.configs.items():
        waits = [other for other in sorted(recipes.references(config)) if not _done(command.workdir / other)]
        _check_folder(command, name, config)
        with _named(name), tempfile.TemporaryDirectory(prefix='jaxtune-check-') as cache:
            if waits:
                found = _without_stages(config)
            else:
                found = _TASKS[config.task](recipes.point_to_stages(config, command.workdir), pathlib.Path(cache))
        found += [f'the rest when {" and ".join(waits)} is done'] if waits else []
        said.append(f'{f"{name}: " if name else ""}{config.task} ({", ".join(found)})')
    return f'checked, nothing is wrong: {"; ".join(said)}'


@contextlib.contextmanager
def _named(stage: str) -> Iterator[None]:
    """Puts the stage's name before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f'stage {stage}: {error}' if stage else str(error)) from None


def _check_folder(command: Command, name: str, config: ConfigDict) -> None:
    """Refuses a workdir that the run would be refused in."""
    folder = command.workdir / name
    ownership.check_owned(command.workdir)
    ownership.check_owned(folder)
    if folder.is_dir():
        inputs = {other: workdir.result_fingerprint(command.workdir / other) for other in recipes.references(config)}
        workdir.check_workdir(folder, config, command.overwrite, inputs, fingerprints(config))


def _done(folder: pathlib.Path) -> bool:
    return (folder / 'result.json').is_file()


def _without_stages(config: ConfigDict) -> list[str]:
    """Checks what can be of a stage before those that it reads are done: its keys, and what it reads beside them."""
    if config.task == 'prepare':
        prepare.check(config)
        return ['keys']
    module = {'train': train, 'evaluate': evaluate, 'generate': generate, 'export': export, 'compile': compile}
    config = _as_run(config)
    mesh = compile.target_mesh(config) if config.task == 'compile' else make_mesh(config.mesh)
    module.get(config.task, trainer).check(config, mesh)
    given = {key: recipes.config_get(config, key) for key in recipes.REFERENCES}
    given = {key: value for key, value in given.items() if value and not value.startswith('@')}
    if 'tokenizer.path' in given:
        tokenizers.load(load.tokenizer_folder(config))
    for key in ('data.train', 'data.eval', 'sft.demonstrations'):
        if given.get(key, 'python-stdlib') != 'python-stdlib':
            next(iter(open_records(given[key], key)), None)
    if ':' in given.get('rl.reward', ''):
        open_reward(config, mesh, config.generate.batch_size, weights=False)
    return ['keys', *(key for key in given if key not in ('model.path', 'method.path', 'dpo.reference'))]


def _as_run(config: ConfigDict) -> ConfigDict:
    """The recipe as its task reads it."""
    return trainer.as_policy(config) if config.task in REWARDED else config


def _described(parts: load.Assembly) -> list[str]:
    family = parts.model.hf_config.get('model_type', parts.model.kind)
    found = [f'a {family} of {amount(tree.count(parts.params)).strip()} parameters', f'{len(parts.tokenizer)} tokens']
    return [*found, *(f'adapter {name}' for name in parts.adapters)]


def _train(config: ConfigDict, cache: pathlib.Path) -> list[str]:
    mesh = make_mesh(config.mesh)
    train.check(config, mesh)
    with jax.set_mesh(mesh):
        parts = load.assemble(config, mesh, weights=False)
        rows = _rows(config, parts, cache, ('train', 'eval'))
        if sample_callback.wanted(config):
            sample_callback.Witness(config, cache, mesh, parts)
        if config.objective == 'dpo' and config.dpo.reference:
            objectives.get('dpo').load_reference(config, mesh, weights=False)
        _trace(config, mesh, parts)
    return [*_described(parts), *rows]


def _rows(config: ConfigDict, parts: load.Assembly, cache: pathlib.Path, splits: tuple[str, ...]) -> list[str]:
    objective = objectives.get(config.objective)
    found = []
    for split in splits:
        if config.data[split]:
            rows = objective.dataset(config, split, parts.tokenizer, cache)
            found.append(f'{len(rows):,} rows of data.{split}')
    return found


def _trace(config: ConfigDict, mesh: Mesh, parts: load.Assembly, objective=None) -> None:
    """Traces an update: shapes that do not go together fail here. Nothing is compiled."""
    trainable, frozen = apply.partition(config, parts.params, parts.whole)
    program = make_program(config, mesh, parts.model, trainable, max(1, config.train.steps), parts.fresh, objective)
    accumulate = 1 if config.train.accumulate == 'auto' else config.train.accumulate
    jax.eval_shape(program.train_step(accumulate), program.shapes, frozen, program.batch_shapes())


def _learn_from_rewards(config: ConfigDict, cache: pathlib.Path) -> list[str]:
    mesh, config = make_mesh(config.mesh), _as_run(config)
    trainer.check(config, mesh)
    with jax.set_mesh(mesh):
        parts = load.assemble(config, mesh, weights=False)
        trainer.check_policy(config, parts)
        open_reward(config, mesh, config.generate.batch_size, weights=False)
        prompts, held_out = trainer.all_prompts(config, parts)
        _trace(config, mesh, parts, trainer.rl.get(config.task))
    found = [f'{len(prompts):,} prompts of data.train', f'rl.reward={config.rl.reward}']
    return [*_described(parts), *found, *([f'{len(held_out):,} of data.eval'] if held_out else [])]


def _evaluate(config: ConfigDict, cache: pathlib.Path) -> list[str]:
    mesh = make_mesh(config.mesh)
    evaluate.check(config, mesh)
    with jax.set_mesh(mesh):
        parts = load.assemble(config, mesh, weights=False)
        return [*_described(parts), *_rows(config, parts, cache, ('eval',))]


def _generate(config: ConfigDict, cache: pathlib.Path) -> list[str]:
    mesh = make_mesh(config.mesh)
    generate.check(config, mesh)
    with jax.set_mesh(mesh):
        parts = load.assemble(config, mesh, weights=False)
        generate.check_writes(config, parts)
        prompts = read_prompts(config, parts)
        Completer(config, mesh, parts, config.generate.batch_size)
    return [*_described(parts), f'{len(prompts):,} prompts of data.eval']


def _export(config: ConfigDict, cache: pathlib.Path) -> list[str]:
    mesh = make_mesh(config.mesh)
    export.check(config, mesh)
    with jax.set_mesh(mesh):
        source = pathlib.Path(config.model.path)
        if export.unfinished(source):
            parts = load.assemble(export.stored_recipe(source), mesh, weights=False)
        else:
            parts = load.assemble(config, mesh, weights=False)
        jax.eval_shape(lambda params: export.merged(params, f'model.path={source}'), parts.params)
        return [*_described(parts), *(_rows(config, parts, cache, ('eval',)) if config.export.requantise else [])]


def _compile(config: ConfigDict, cache: pathlib.Path) -> list[str]:
    mesh = compile.target_mesh(config)
    compile.check(config, mesh)
    model, trainable, frozen, _ = compile.open_program(config, mesh)
    family, size = model.hf_config.get('model_type', model.kind), amount(tree.count((trainable, frozen)))
    return [f'a {family} of {size.strip()} parameters', f'{mesh.size} x {mesh.devices.flat[0].device_kind}']


def _prepare(config: ConfigDict, cache: pathlib.Path) -> list[str]:
    plan = prepare.check(config)
    if config.tokenizer.path:
        tokenizers.load(config.tokenizer.path)
    if plan is None:
        documents = streaming.collect(config.data)
        first = next(iter(documents), None)
        if first is None:
            raise UserError(f'{documents.name}: holds no document; expected at least one')
        return [documents.name]
    units = prepare.find_units(plan)
    return [f'{len(units):,} files or parts of them in {len(plan.sources)} sources']


_TASKS = {
    'prepare': _prepare, 'train': _train, 'ppo': _learn_from_rewards, 'grpo': _learn_from_rewards,
    'evaluate': _evaluate, 'generate': _generate, 'export': _export, 'compile': _compile,
}  # fmt: skip
