"""Tasks that learn from rewards: `task=ppo`, `task=grpo`, or an algorithm named as `module:NAME`."""

import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune.common import console
from jaxtune.common.formatting import amount
from jaxtune.common.settings import Settings
from jaxtune.common.sources import AUTO
from jaxtune.data.holdout import Holdout, words
from jaxtune.data.mixture import Mixture
from jaxtune.data.templates import Template, open_template
from jaxtune.errors import UserError
from jaxtune.generation.prompts import Prompt, prompts_by_source, read_prompts
from jaxtune.models import value_head
from jaxtune.parallel import make_mesh
from jaxtune.parallel.batches import check_batch, check_rows
from jaxtune.pretrained.heads import folder_head
from jaxtune.pretrained.load import ModelBundle, load_model
from jaxtune.pretrained.save import save_tuned
from jaxtune.recipe.flags import Command
from jaxtune.rl import Reward, environments
from jaxtune.rl.environments import RunningEnvironment
from jaxtune.rl.reward_task import PromptNumbers, RewardTask, StepSizes
from jaxtune.rl.rewards import check_references, open_reward
from jaxtune.rl.rollouts import Sampler
from jaxtune.rl.selection import Selection
from jaxtune.tasks import present, setup, specs
from jaxtune.training import announce, divergence
from jaxtune.training.run_info import compiled_memory
from jaxtune.training.trainer import Trainer
from jaxtune.weights.tree import combine


def run(config: Settings, workdir: pathlib.Path, command: Command) -> dict[str, Any]:
    """Trains to the end, or until it is to stop; returns `result.json`'s content.

    Raises:
      UserError: the recipe, the prompts, the model or the reward is wrong, or the loss is no longer finite.
      SystemExit: status 143 after SIGTERM, 130 after Ctrl-C, with a checkpoint saved.
    """
    return run_on(make_mesh(config.mesh), config, workdir, command)


def run_on(mesh: Mesh, config: Settings, workdir: pathlib.Path, command: Command) -> dict[str, Any]:
    """Runs on a mesh."""
    with jax.set_mesh(mesh):
        trainer, first_lines, last_lines = open_trainer(config, workdir, mesh, command)
        return trainer.run(first_lines, last_lines)


def check(config: Settings, mesh: Mesh) -> None:
    """Refuses sizes that do not go into each other, naming the key.

    Raises:
      UserError: so it is.
    """
    algorithm = specs.bound_algorithm(config)
    check_batch(mesh, config.train.batch_size, specs.accumulate_at_least(config), algorithm.batch_spec())
    rollouts = f'rl.rollouts={config.rl.rollouts}: expected a multiple of'
    if config.rl.rollouts % config.train.batch_size:
        raise UserError(f'{rollouts} train.batch_size={config.train.batch_size}')
    if config.rl.rollouts % algorithm.group:
        raise UserError(f'{rollouts} rl.group={algorithm.group}')
    for key, off in (('skip_equal', False), ('resample', 0)):
        if config.rl[key] != off and algorithm.group == 1:
            raise UserError(
                f'rl.{key}={config.rl[key]}: expected {off} with task={config.task}, which asks each prompt once'
            )
    if config.rl.overlong_buffer > config.generate.max_new_tokens:
        raise UserError(
            f'rl.overlong_buffer={config.rl.overlong_buffer}: expected at most generate.max_new_tokens='
            f'{config.generate.max_new_tokens}, whose last tokens it is'
        )
    check_rows(mesh, 'generate.batch_size', config.generate.batch_size)
    if config.generate.temperature == 0:
        raise UserError('generate.temperature=0: expected more, for answers are compared with what else was likely')
    for name, neutral in (('top_k', 0), ('top_p', 1.0), ('beams', 1)):
        if config.generate[name] != neutral:
            raise UserError(
                f'generate.{name}={config.generate[name]}: expected {neutral}; answers are drawn from the whole policy'
            )
    if config.generate.max_new_tokens >= config.data.seq_len:
        raise UserError(
            f'generate.max_new_tokens={config.generate.max_new_tokens}: expected less than data.seq_len='
            f'{config.data.seq_len}, which prompt and answer share'
        )
    if not config.data.train:
        raise UserError("data.train='': expected the prompts: a path, a glob, a folder, python-stdlib or @STAGE")
    setup.position_bounds(config)
    setup.check_export(config)
    setup.profiled(config, config.train.steps)
    present.check(config)


def check_policy(config: Settings, bundle: ModelBundle) -> None:
    """Refuses a model that cannot be a policy.

    Raises:
      UserError: it is a reward model, or its logits cannot be tempered.
    """
    if bundle.folder and folder_head(bundle.folder) != 'lm':
        raise UserError(f'model.path={config.model.path}: a reward model writes no text; expected a policy')
    head = jax.eval_shape(bundle.model.head, value_head.policy(bundle.params))
    if config.generate.temperature != 1.0 and head.softcap:
        raise UserError(
            f'generate.temperature={config.generate.temperature}: expected 1 for a model that caps its logits'
        )


def all_prompts(
    config: Settings, bundle: ModelBundle, environment: RunningEnvironment | None = None
) -> tuple[dict[str, list[Prompt]], list[Prompt]]:
    """The prompts to train on, by source, and those held out, of each what leaves room for an answer.

    Conversations without tools are rendered with those of the environment where the tokenizer's template takes tools.

    Raises:
      UserError: there are none to train on.
    """
    args = template_args(config, bundle, environment)
    limit, data = config.data.seq_len, specs.data_spec(config, holdout=None, template_args=args)
    spec = specs.prompt_spec(config, count=0, limit=limit, data=data)
    train = prompts_by_source(spec, bundle, fitting=True, split='train')
    if config.data.eval == AUTO:
        return _held_out(train, Holdout(config.data.eval_fraction, config.seed), config.generate.prompts)
    spec = specs.prompt_spec(config, limit=limit, data=specs.data_spec(config, template_args=args))
    return train, read_prompts(spec, bundle, fitting=True) if config.data.eval else []


def template_args(config: Settings, bundle: ModelBundle, environment: RunningEnvironment | None) -> dict[str, Any]:
    """What the chat template is given: `data.template_args`, and the environment's tools where it takes some."""
    args = config.data.template_args.to_dict()
    takes = config.data.template == AUTO and 'tools' in str(bundle.tokenizer.chat_template or '')
    tools = list(environment.tools) if environment and takes else []
    return {'tools': tools, **args} if tools else args


def _held_out(
    prompts: dict[str, list[Prompt]], holdout: Holdout, count: int
) -> tuple[dict[str, list[Prompt]], list[Prompt]]:
    """Of all prompts those to train on and those that `data.eval=auto` holds out, at most `count`; 0 = all."""
    scores = {label: [holdout.score(prompt.text) for prompt in some] for label, some in prompts.items()}
    holdout = holdout.decided({label: np.array(values) for label, values in scores.items()})
    train: dict[str, list[Prompt]] = {label: [] for label in prompts}
    held_out: list[Prompt] = []
    for label, some in prompts.items():
        for prompt, score in zip(some, scores[label], strict=True):
            (held_out if holdout.holds(score) else train[label]).append(prompt)
    console.note(words({label: (len(prompts[label]) - len(train[label]), len(prompts[label])) for label in prompts}))
    return train, held_out[: count or None]


def prompt_order(config: Settings, prompts: dict[str, list[Prompt]]) -> PromptNumbers | Mixture:
    """In which order the prompts of all sources, one after the other, are asked: by the weights of the sources."""
    sources = specs.data_spec(config).sources('train')
    firsts = itertools.accumulate((len(some) for some in prompts.values()), initial=0)
    parts = {
        label: PromptNumbers(len(some), first) for (label, some), first in zip(prompts.items(), firsts, strict=False)
    }
    if '' in parts:
        return parts['']
    return Mixture(parts, {source.label: source.weight for source in sources})


def environment(config: Settings) -> RunningEnvironment | None:
    """What answers turns; None where a completion is one turn.

    Raises:
      UserError: there is no such thing, or it cannot run here.
    """
    return RunningEnvironment(config.rl) if config.rl.environment else None


def exchanging(
    config: Settings, bundle: ModelBundle, environment: RunningEnvironment | None, prompts: Sequence[Prompt]
) -> tuple[RunningEnvironment, int, Template | None] | None:
    """What a `Sampler` is given of an environment: with it, the turns at most, and the template of conversations."""
    if environment is None:
        return None
    chats = any(not isinstance(prompt.text, str) for prompt in prompts)
    data = config.data
    args = template_args(config, bundle, environment)
    template = open_template(data.template, bundle.tokenizer, data.format, args=args) if chats else None
    return environment, config.rl.max_turns, template


def reward(config: Settings, mesh: Mesh, *, weights: bool = True) -> Reward:
    """What scores answers; without weights, a reward model's are not read."""
    if not config.rl.reward and config.rl.environment:
        return Reward('', lambda prompts, completions: np.zeros(len(completions), np.float32))
    model = functools.partial(specs.reward_model_spec, config)
    return open_reward(config.rl, model, mesh, config.generate.batch_size, weights=weights)


def selection(config: Settings, group: int) -> Selection:
    """Which answers a step learns from, of which `group` answer each prompt."""
    rl, longest = config.rl, config.generate.max_new_tokens
    return Selection(group, rl.skip_equal, rl.overlong, longest, rl.overlong_buffer, rl.missing_eos_penalty)


def open_trainer(
    config: Settings, workdir: pathlib.Path, mesh: Mesh, command: Command
) -> tuple[Trainer, Callable[[], None], Callable[[int, Mapping[str, Any]], None]]:
    """The trainer of a recipe, and what prints its first and its last lines."""
    info = setup.run_info(config, command, mesh)
    check(config, mesh)
    algorithm, method = specs.bound_algorithm(config), specs.method(config)
    with info.timed('load'):
        bundle = load_model(specs.model_spec(config), mesh)
        check_policy(config, bundle)
        scorer, answering = reward(config, mesh), environment(config)
    with info.timed('data'):
        by_source, held_out = all_prompts(config, bundle, answering)
        prompts = [prompt for some in by_source.values() for prompt in some]
        check_references(scorer, prompts, 'data.train')
        check_references(scorer, held_out, 'data.eval')
        environments.check_references(answering, [*prompts, *held_out])
        order = prompt_order(config, by_source)
    asked = config.rl.rollouts // algorithm.group
    steps = config.train.steps or max(1, math.ceil(config.train.epochs * len(prompts) / asked))
    updates = config.rl.epochs * (config.rl.rollouts // config.train.batch_size)  # a step
    observer = setup.observer(config, workdir, info, steps, 'step')

    reached = setup.reached(config, bundle)
    trainable, frozen = setup.split(config, bundle)
    program = setup.program(config, mesh, bundle, trainable, algorithm, steps * updates)
    state = program.init_state(trainable)
    info.flops_per_token = setup.training_flops(config, bundle.model, algorithm)
    info.describe_model(bundle.model, bundle.params, trainable, state['opt_state'])
    with info.timed('compile'):
        accumulate, step = setup.compiled_step(config, mesh, program, state, frozen)
    asked_for = [*prompts, *held_out]
    exchange = exchanging(config, bundle, answering, asked_for)
    sampler = Sampler(config.generate, mesh, bundle, asked_for, config.data.seq_len, config.seed, exchange)
    metric = 'eval/reward' if config.eval.metric == 'eval/loss' else config.eval.metric
    checkpoints = setup.checkpoints(config, workdir, metric)

    def diagnose(number: int, what: str, before: list[dict[str, float]]) -> str:
        return (
            f'expected a smaller optimizer.lr than {config.optimizer.lr:g}, or more rl.kl_coef than '
            f'{config.rl.kl_coef:g}; {divergence.last_good(checkpoints, workdir)}'
        )

    # The trainer alone owns the weights from here on: each update consumes them.
    bundle = setup.without_params(bundle)

    def export(trainable: Any, number: int) -> None:
        with info.timed('export'):
            policy = value_head.policy(combine(trainable, frozen))
            save_tuned(workdir, method, bundle, policy, config.export.dtype)

    rl = config.rl
    task = RewardTask(
        algorithm,
        program,
        step,
        state,
        frozen,
        sampler,
        scorer,
        prompts,
        order,
        held_out,
        StepSizes(rl.rollouts, rl.epochs, config.train.batch_size, accumulate, config.data.packing, rl.resample),
        selection(config, algorithm.group),
        info,
        workdir,
        diagnose,
        export,
        config.eval.batches,
    )
    trainer = Trainer(
        task,
        setup.schedule(config, steps, metric),
        program,
        state,
        checkpoints,
        info,
        workdir,
        observer,
        wandb=config.log.wandb,
    )
    memory, name = compiled_memory(step), algorithm.algorithm.name
    kernels = bundle.model.kernels
    if titles := setup.declared(config).titles:
        info.facts['titles'] = dict(titles)
    info.facts |= {'steps': steps, 'accumulate': accumulate, 'gzip_bits_per_byte': None}

    def first_lines() -> None:
        line = _updates_line(rl.rollouts, algorithm.group, steps, updates, len(prompts), config, accumulate)
        announce.announce(
            info,
            workdir,
            data={},
            kernels=kernels,
            memory=memory,
            updates=line,
            optimizer=config.optimizer,
            mixture=announce.mixture_facts(order, steps * asked),
            targets=reached,
        )

    said = dict(kernels.products)

    def last_lines(exported: int, metrics: Mapping[str, Any]) -> None:
        if kernels.products != said:  # those of rollouts, which are traced when they are first made
            console.note(f'products: {kernels.products_line}')
        announce.conclude(info, workdir, exported, metrics, reward=metrics.get(f'{name}/reward'))

    return trainer, first_lines, last_lines


def _updates_line(
    rollouts: int, group: int, steps: int, updates: int, prompts: int, config: Settings, accumulate: int
) -> str:
    asked = f'{rollouts // group} prompts x {group} answers' if group > 1 else f'{group} answer each'
    cut = f' in {accumulate} micro-batches' if accumulate > 1 else ''
    passes = steps * rollouts / group / max(prompts, 1)
    return (
        f'{steps:,} steps of {rollouts} answers ({asked}) from {amount(prompts)} prompts, '
        f'{passes:.3g} passes; {updates} updates each, of {config.train.batch_size} answers{cut}'
    )
