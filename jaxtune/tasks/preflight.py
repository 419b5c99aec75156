"""`--check`: everything that a recipe names is read and checked, and nothing is trained or written.

Of weights only the headers are read, so that a large model takes no more memory than a small one.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping

import jax
from jax.sharding import Mesh

from jaxtune.common import sources
from jaxtune.common.formatting import amount
from jaxtune.common.settings import Settings
from jaxtune.config import is_rewarded
from jaxtune.data import tokenizer as tokenizers
from jaxtune.data.inputs import KEYS, fingerprints
from jaxtune.data.mixture import Mixture
from jaxtune.data.prepare import streaming
from jaxtune.data.records import open_records
from jaxtune.errors import UserError
from jaxtune.generation.generator import Generator
from jaxtune.generation.prompts import read_prompts
from jaxtune.models.frozen import FrozenModel
from jaxtune.parallel import make_mesh
from jaxtune.pretrained import gguf_file, load
from jaxtune.pretrained.save import merged
from jaxtune.recipe import ownership, recipes, workdir  # fmt: skip
from jaxtune.recipe.flags import Command
from jaxtune.rl.environments import check_references as check_answers
from jaxtune.rl.rewards import check_references
from jaxtune.tasks import (
    ahead,
    evaluate,
    export,
    fit,
    generate,
    mesh_choice,
    pipeline,
    prepare,
    rewarded,
    setup,
    specs,
    teacher,
    train,
)
from jaxtune.training.program import Learning
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
        waits = [stage for stage in sorted(recipes.references(config)) if not _done(command.workdir / stage)]
        _check_folder(command, name, config)
        with _named(name), tempfile.TemporaryDirectory(prefix='jaxtune-check-') as cache:
            if waits:
                checked = _without_stages(config)
            else:
                checked = _check_of(config.task)(pipeline.point_to_stages(config, command.workdir), pathlib.Path(cache))
        checked += [f'the rest when {" and ".join(waits)} is done'] if waits else []
        said.append(f'{f"{name}: " if name else ""}{config.task} ({", ".join(checked)})')
    return f'checked, nothing is wrong: {"; ".join(said)}'


@contextlib.contextmanager
def _named(stage: str) -> Iterator[None]:
    """Puts the stage's name before what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f'stage {stage}: {error}' if stage else str(error)) from None


def _check_folder(command: Command, name: str, config: Settings) -> None:
    """Refuses a workdir that the run would be refused in."""
    folder = command.workdir / name
    ownership.check_owned(command.workdir)
    ownership.check_owned(folder)
    if folder.is_dir():
        inputs = {stage: workdir.result_fingerprint(command.workdir / stage) for stage in recipes.references(config)}
        data = {key: recipes.config_get(config, key) for key in KEYS}
        workdir.check_workdir(folder, config, command.overwrite, inputs, fingerprints(data))


def _done(folder: pathlib.Path) -> bool:
    return (folder / 'result.json').is_file()


def _without_stages(config: Settings) -> list[str]:
    """Checks what can be of a stage before those that it reads are done: its keys, and what it reads beside them."""
    if config.task == 'prepare':
        prepare.check(config)
        return ['keys']
    if config.task == 'compile':
        config = fit.cells(config)[0]
    module = {'train': train, 'evaluate': evaluate, 'generate': generate, 'export': export, 'compile': ahead}
    mesh = mesh_choice.any_mesh(config, ahead.target(config)[0] if config.task == 'compile' else None)
    module.get(config.task, rewarded).check(config, mesh)
    given = {key: recipes.config_get(config, key) for key in recipes.REFERENCES}
    given = {key: value for key, value in given.items() if value and (not isinstance(value, str) or value[0] != '@')}
    if 'tokenizer.path' in given:
        tokenizers.load(load.tokenizer_folder(specs.model_spec(config)))
    for key in ('data.train', 'data.eval', 'sft.demonstrations'):
        for source in sources.read(given.get(key, '')):
            if source.path not in ('python-stdlib', sources.AUTO) and not source.path.startswith('@'):
                next(iter(open_records(source.path, key)), None)
    if ':' in given.get('rl.reward', ''):
        rewarded.reward(config, mesh, weights=False)
    return [
        'keys',
        *(key for key in given if key not in ('model.path', 'method.path', 'dpo.reference', 'distill.teacher')),
    ]


def _described(bundle: load.ModelBundle) -> list[str]:
    family = bundle.model.hf_config.get('model_type', bundle.model.kind)
    facts = [f'a {family} of {amount(tree.count(bundle.params)).strip()} parameters', f'{len(bundle.tokenizer)} tokens']
    return [*facts, *(f'adapter {name}' for name in bundle.adapters)]


def _train(config: Settings, cache: pathlib.Path) -> list[str]:
    mesh = mesh_choice.any_mesh(config)
    train.check(config, mesh)
    with jax.set_mesh(mesh):
        bundle = load.load_model(specs.model_spec(config), mesh, weights=False)
        rows = _rows(config, bundle, cache, ('train', 'eval'))
        setup.sample_callback(config, mesh, bundle, cache)
        objective = specs.objective(config)
        reference = objective.objective.reference
        if reference and (path := reference.path(objective.settings)):
            load.load_model(specs.other_model_spec(config, reference.key, path), mesh, weights=False)
        _trace(config, mesh, bundle, objective, teacher.load(config, mesh, weights=False))
    return [*_described(bundle), *rows]


def _rows(config: Settings, bundle: load.ModelBundle, cache: pathlib.Path, splits: tuple[str, ...]) -> list[str]:
    objective = specs.objective(config)
    facts = []
    for split in splits:
        if config.data[split]:
            rows = objective.dataset(split, bundle.tokenizer, cache, bundle.model.config.vocab_size)
            labels = f' ({", ".join(rows.parts)})' if isinstance(rows, Mixture) else ''
            facts.append(f'{len(rows):,} rows of data.{split}{labels}')
    return facts


def _trace(
    config: Settings,
    mesh: Mesh,
    bundle: load.ModelBundle,
    learning: Learning,
    shared: Mapping[str, FrozenModel] | None = None,
) -> None:
    """Traces an update: shapes that do not go together fail here. Nothing is compiled."""
    trainable, frozen = setup.split(config, bundle)
    program = setup.program(config, mesh, bundle, trainable, learning, max(1, config.train.steps), shared)
    jax.eval_shape(
        program.train_step(specs.accumulate_at_least(config)), program.shapes, frozen, program.batch_shapes()
    )


def _learn_from_rewards(config: Settings, cache: pathlib.Path) -> list[str]:
    mesh = make_mesh(config.mesh)
    rewarded.check(config, mesh)
    with jax.set_mesh(mesh):
        bundle = load.load_model(specs.model_spec(config), mesh, weights=False)
        rewarded.check_policy(config, bundle)
        reward, environment = rewarded.reward(config, mesh, weights=False), rewarded.environment(config)
        prompts, held_out = rewarded.all_prompts(config, bundle, environment)
        for some, key in ((prompts.values(), 'data.train'), ((held_out,), 'data.eval')):
            check_references(reward, [prompt for each in some for prompt in each], key)
            check_answers(environment, [prompt for each in some for prompt in each])
        _trace(config, mesh, bundle, specs.bound_algorithm(config))
    facts = [f'{sum(map(len, prompts.values())):,} prompts of data.train']
    facts += [f'rl.{key}={config.rl[key]}' for key in ('reward', 'environment') if config.rl[key]]
    return [*_described(bundle), *facts, *([f'{len(held_out):,} of data.eval'] if held_out else [])]


def _evaluate(config: Settings, cache: pathlib.Path) -> list[str]:
    mesh = make_mesh(config.mesh)
    evaluate.check(config, mesh)
    with jax.set_mesh(mesh):
        bundle = load.load_model(specs.model_spec(config), mesh, weights=False)
        return [*_described(bundle), *_rows(config, bundle, cache, ('eval',))]


def _generate(config: Settings, cache: pathlib.Path) -> list[str]:
    mesh = make_mesh(config.mesh)
    generate.check(config, mesh)
    with jax.set_mesh(mesh):
        bundle = load.load_model(specs.model_spec(config), mesh, weights=False)
        generate.check_writes(config, bundle)
        prompts = read_prompts(specs.prompt_spec(config), bundle)
        Generator(config.generate, mesh, bundle, config.generate.batch_size, config.seed)
    return [*_described(bundle), f'{len(prompts):,} prompts of data.eval']


def _export(config: Settings, cache: pathlib.Path) -> list[str]:
    mesh = make_mesh(config.mesh)
    export.check(config, mesh)
    with jax.set_mesh(mesh):
        source = pathlib.Path(config.model.path)
        if export.unfinished(source):
            bundle = load.load_model(specs.model_spec(export.stored_recipe(source)), mesh, weights=False)
        else:
            bundle = load.load_model(specs.model_spec(config), mesh, weights=False)
        jax.eval_shape(lambda params: merged(params, f'model.path={source}'), bundle.params)
        if config.export.format == 'gguf':
            gguf_file.check(bundle.model, bundle.tokenizer)
        return [*_described(bundle), *(_rows(config, bundle, cache, ('eval',)) if specs.scores_export(config) else [])]


def _compile(config: Settings, cache: pathlib.Path) -> list[str]:
    facts = []
    for cell in fit.cells(config):
        devices, limit = ahead.target(cell)
        mesh = mesh_choice.any_mesh(cell, devices)
        ahead.check(cell, mesh)
        step = ahead.open_step(cell, mesh, limit)
        family = step.model.hf_config.get('model_type', step.model.kind)
        size = amount(tree.count((step.trainable, step.frozen)))
        facts += [f'a {family} of {size.strip()} parameters', f'{mesh.size} x {mesh.devices.flat[0].device_kind}']
    return list(dict.fromkeys(facts))


def _prepare(config: Settings, cache: pathlib.Path) -> list[str]:
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
    return [f'{len(units):,} files or bundle of them in {len(plan.sources)} sources']


def _check_of(task: str) -> Callable[[Settings, pathlib.Path], list[str]]:
    if is_rewarded(task):
        return _learn_from_rewards
    return {
        'prepare': _prepare, 'train': _train, 'evaluate': _evaluate, 'generate': _generate, 'export': _export,
        'compile': _compile,
    }[task]  # fmt: skip
