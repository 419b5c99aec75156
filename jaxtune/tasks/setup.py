"""What tasks that train or score have in common: a program opened over a model, and its evaluator."""

import dataclasses
import json
import pathlib
import socket
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune.common import console
from jaxtune.common.settings import Settings
from jaxtune.config import is_rewarded
from jaxtune.errors import UserError
from jaxtune.generation.generator import Generator
from jaxtune.generation.prompts import read_prompts
from jaxtune.methods import apply, reach
from jaxtune.metrics import names
from jaxtune.models.frozen import FrozenModel
from jaxtune.objectives import OBJECTIVES, Objective, by_position
from jaxtune.parallel import batch_shards, hosts
from jaxtune.parallel.aot import compile_step
from jaxtune.parallel.pace import Pace
from jaxtune.pretrained.load import ModelBundle, load_model
from jaxtune.recipe.flags import Command
from jaxtune.recipe.workdir import stored_signature
from jaxtune.rl import Algorithm
from jaxtune.tasks import specs
from jaxtune.training import profile
from jaxtune.training.checkpoint import Checkpoints
from jaxtune.training.flops import flops_per_token
from jaxtune.training.hang_watch import HangWatch
from jaxtune.training.observer import Observer
from jaxtune.training.program import Learning, Program, make_program
from jaxtune.training.reference import ReferenceLogps
from jaxtune.training.run_info import RunInfo
from jaxtune.training.sample_callback import SampleCallback
from jaxtune.training.trainer import Schedule


def run_info(config: Settings, command: Command, mesh: Mesh | None) -> RunInfo:
    """What the run is, before its model is known."""
    batch, length, name = config.train.batch_size, config.data.seq_len, config.task
    if is_rewarded(config.task):
        tokens = config.rl.rollouts * config.rl.epochs * length  # each as often as a step learns from it
        name = specs.algorithm(config).name
    elif config.task in ('train', 'evaluate', 'compile'):
        tokens = batch * specs.objective(config).objective.rows_per_example * length
    else:
        tokens = batch * length
    return RunInfo(name, command.argv, str(command.recipe), mesh, tokens)


def training_flops(
    config: Settings, bundle_model: Any, learning: Learning, shared: Mapping[str, FrozenModel] | None = None
) -> float | None:
    """FLOPs a token of training, with those of what is asked; None for a model without a formula."""
    try:
        method = specs.method(config).method
        asked = [frozen.model for frozen in (shared or {}).values()]
        return flops_per_token(bundle_model, method, config.data.seq_len, learning.batch_spec(), asked)
    except NotImplementedError:
        return None


def program(
    config: Settings,
    mesh: Mesh,
    bundle: ModelBundle,
    trainable: Any,
    learning: Learning,
    steps: int,
    shared: Mapping[str, FrozenModel] | None = None,
) -> Program:
    """The update of a recipe over a model."""
    return make_program(
        mesh,
        bundle.model,
        trainable,
        learning,
        optimizer=config.optimizer,
        steps=steps,
        batch_size=config.train.batch_size,
        seed=config.seed,
        method=specs.method(config),
        newly_initialized=bundle.newly_initialized,
        balance=specs.balance(config, mesh, bundle.model),
        shared=shared,
    )


def split(config: Settings, bundle: ModelBundle) -> tuple[Any, Any]:
    """The trainable and the frozen half of a bundle's parameters."""
    return apply.partition(specs.method(config).method, bundle.params, bundle.trained_whole)


def reached(config: Settings, bundle: ModelBundle) -> str:
    """What part of the model the targets reach; says in a line what a user may not expect of them."""
    if surprise := reach.warning(bundle.params, bundle.model, config.method):
        console.note(surprise)
    return reach.reached(bundle.params, bundle.model)


def compiled_step(config: Settings, mesh: Mesh, program: Program, state: Any, frozen: Any) -> tuple[int, Any]:
    """How many micro-batches an update is cut into, and the update compiled so."""
    args = (state, frozen, program.batch_shapes())
    rows = config.train.batch_size // batch_shards(mesh)
    return compile_step(program.train_step, args, config.train.accumulate, rows)


def declared(config: Settings) -> Objective | Algorithm:
    """What the recipe trains, which declares its own metrics."""
    return specs.algorithm(config) if is_rewarded(config.task) else specs.objective(config).objective


def higher_is_better(config: Settings, metric: str) -> bool:
    """Whether a higher value of a metric is better."""
    return names.higher_is_better(metric, declared(config).higher_is_better)


def schedule(config: Settings, steps: int, metric: str) -> Schedule:
    """When a run does what."""
    return Schedule(
        steps,
        config.log.every,
        config.eval.every,
        config.checkpoint.every,
        config.eval.patience,
        metric,
        higher_is_better(config, metric),
    )


def check_export(config: Settings) -> None:
    """Refuses formats that a run does not export to by itself.

    Raises:
      UserError: names the key.
    """
    if config.export.format != 'safetensors':
        raise UserError(
            f'export.format={config.export.format}: expected safetensors with task={config.task}; task=export then '
            'makes the other of its workdir'
        )


def profiled(config: Settings, steps: int) -> tuple[int, int] | None:
    """The first and the last update to profile in a run of so many, 0 where that is not known yet; None for none.

    Raises:
      UserError: the run has none of them.
    """
    traced = profile.bounds(config.log.profile)
    if traced and 0 < steps < traced[0]:
        raise UserError(f'log.profile={config.log.profile}: expected updates of this run, which has {steps}')
    return traced


def observer(config: Settings, workdir: pathlib.Path, info: RunInfo, steps: int, unit: str) -> Observer:
    """What looks at the loop of a run of so many steps from beside it.

    Raises:
      UserError: the run has none of the updates to profile.
    """
    processes, process, traced = jax.process_count(), jax.process_index(), profiled(config, steps)
    compared = None
    if processes > 1:
        compared = Pace(processes, process, socket.gethostname(), hosts.send_to_primary, console.note)
        hosts.on_message(compared.receive)
    return Observer(
        info,
        workdir,
        config.log.every,
        profile.Profile(*traced, workdir / profile.FOLDER) if traced else None,
        HangWatch(config.log.hang_seconds, info.timer, workdir, process, unit) if config.log.hang_seconds else None,
        compared,
    )


def checkpoints(config: Settings, workdir: pathlib.Path, metric: str) -> Checkpoints:
    """Where a run saves its state."""
    folder = workdir / 'checkpoints'
    better = higher_is_better(config, metric)
    return Checkpoints(folder, config.checkpoint.keep, metric, better, stored_signature(workdir))


def position_bounds(config: Settings) -> np.ndarray | None:
    """Bounds of the buckets of positions that `eval.by_position` asks for.

    Raises:
      UserError: more than a row has tokens, or losses that are not of one token each.
    """
    buckets, known = config.eval.by_position, [n for n in OBJECTIVES.names if OBJECTIVES.get(n).by_position]
    if not buckets:
        return None
    if is_rewarded(config.task) or not specs.objective(config).objective.by_position:
        of = f'task={config.task}' if is_rewarded(config.task) else f'objective={config.objective}'
        raise UserError(f'eval.by_position={buckets}: expected 0 for {of}; it is for objectives {", ".join(known)}')
    if buckets > config.data.seq_len:
        raise UserError(f'eval.by_position={buckets}: expected at most data.seq_len={config.data.seq_len}')
    return by_position.bounds(buckets, config.data.seq_len)


def reference_logps(config: Settings, mesh: Mesh, bundle: ModelBundle, cache: pathlib.Path) -> ReferenceLogps:
    """What gives rows the values of the reference model that the objective's loss reads."""
    objective = specs.objective(config)

    def load(path: str) -> tuple[Any, Any]:
        key = objective.objective.reference.key if objective.objective.reference else ''
        reference = load_model(specs.other_model_spec(config, key, path), mesh)
        return reference.model, reference.params

    changes = json.dumps(dict(bundle.overrides), sort_keys=True) if bundle.overrides else ''
    identity = (config.model.path, config.model.compute_dtype, *([changes] if changes else ()))
    if config.model.matmul:
        identity = (*identity, config.model.matmul)
    size = config.eval.batch_size or config.train.batch_size
    return ReferenceLogps(objective, bundle.model, bundle.params, mesh, size, cache, identity, load)


def sample_callback(config: Settings, mesh: Mesh, bundle: ModelBundle, workdir: pathlib.Path) -> SampleCallback | None:
    """What answers the first `eval.samples` prompts of `data.eval`, greedily; None where there is none to answer.

    Raises:
      UserError: the prompts are wrong.
    """
    count, objective = config.eval.samples, specs.objective(config).objective
    changes = {'format': 'pair'} if objective.name == 'seq2seq' else {}
    if not count or not config.data.eval:
        return None
    data = specs.objective(config, **changes).decided(workdir / 'cache')
    # Some of the prompts may be too long.
    spec = specs.prompt_spec(config, count=8 * count, prompt_tokens=objective.prompt_tokens, data=data)
    prompts = read_prompts(spec, bundle, objective.name == 'sft', fitting=True, needed=False)[:count]
    if not prompts:
        console.note(
            f'eval.samples={count}: none is written: no prompt of data.eval leaves room for '
            f'generate.max_new_tokens={config.generate.max_new_tokens}'
        )
        return None
    rows = batch_shards(mesh)
    generator = Generator(config.generate, mesh, bundle, -(-len(prompts) // rows) * rows, config.seed, greedy=True)
    return SampleCallback(generator, prompts, workdir)


def without_params(bundle: ModelBundle) -> ModelBundle:
    """Model and tokenizer alone."""
    return dataclasses.replace(bundle, params=None)
