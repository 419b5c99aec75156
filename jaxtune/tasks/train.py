"""`task=train`: a loader's batches, one update each."""

import contextlib
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune.common import console
from jaxtune.common.settings import Settings
from jaxtune.data.loader import Loader
from jaxtune.data.mixture import Mixture
from jaxtune.errors import UserError
from jaxtune.metrics.writer import MetricsWriter
from jaxtune.models.frozen import FrozenModel
from jaxtune.objectives import OBJECTIVES, Objective
from jaxtune.parallel import place
from jaxtune.parallel.batches import check_batch
from jaxtune.pretrained.load import load_model
from jaxtune.pretrained.save import save_tuned
from jaxtune.recipe.flags import Command
from jaxtune.tasks import mesh_choice, present, setup, specs, teacher
from jaxtune.training import announce, divergence
from jaxtune.training.evaluator import Evaluator, make_evaluator
from jaxtune.training.logger import Diagnose, TrainLogger
from jaxtune.training.run_info import RunInfo, compiled_memory, data_facts
from jaxtune.training.sample_callback import SampleCallback
from jaxtune.training.step import State
from jaxtune.training.trainer import Trainer
from jaxtune.weights import tree


def run(config: Settings, workdir: pathlib.Path, command: Command) -> dict[str, Any]:
    """Trains to the end, or until it is to stop; returns `result.json`'s content.

    Raises:
      UserError: the recipe, the data or the model is wrong, or the loss is no longer finite.
      SystemExit: status 143 after SIGTERM, 130 after Ctrl-C, with a checkpoint saved.
    """
    return run_on(mesh_choice.stored_mesh(config, workdir), config, workdir, command)


def run_on(mesh: Mesh, config: Settings, workdir: pathlib.Path, command: Command) -> dict[str, Any]:
    """Runs on a mesh."""
    with jax.set_mesh(mesh):
        trainer, first_lines, last_lines = open_trainer(config, workdir, mesh, command)
        return trainer.run(first_lines, last_lines)


def check(config: Settings, mesh: Mesh) -> None:
    """Refuses what the recipe alone shows to be wrong.

    Raises:
      UserError: sizes that the mesh cannot divide, or keys that are missing.
    """
    objective = specs.objective(config)
    check_batch(mesh, config.train.batch_size, specs.accumulate_at_least(config), objective.batch_spec())
    if config.eval.samples and objective.objective.prompt_tokens is None:
        writing = [name for name in OBJECTIVES.names if OBJECTIVES.get(name).prompt_tokens is not None]
        raise UserError(f'eval.samples={config.eval.samples}: expected an objective of {", ".join(writing)}, or 0')
    if not config.data.train:
        raise UserError("data.train='': expected a path, a glob, a folder, a dataset id, python-stdlib or @STAGE")
    setup.position_bounds(config)
    setup.check_export(config)
    setup.profiled(config, config.train.steps)
    present.check(config)


class TrainTask:
    """What a run of training does in a step; a `training.trainer.Task`.

    Args:
      step: the compiled update.
      frozen: the half of the tree that stays.
      loader: the training data.
      batch_size: sequences an update.
      mesh: where batches go.
      info: of the run.
      evaluator: of held-out data, or None.
      samples: answers some prompts before and after, or None.
      export: writes the model.
      counted: what the loss is a mean over.
      diagnose: what a loss that is not finite comes from.
      shared: what the loss finds in every batch beside its rows.
    """

    title = 'train'

    def __init__(
        self,
        step: Callable,
        frozen: Any,
        loader: Loader,
        batch_size: int,
        mesh: Mesh,
        info: RunInfo,
        evaluator: Evaluator | None,
        samples: SampleCallback | None,
        export: Callable[[Any], None],
        counted: str,
        diagnose: Diagnose,
        shared: Mapping[str, FrozenModel],
    ) -> None:
        self.step, self.frozen, self.loader, self.batch_size, self.mesh = step, frozen, loader, batch_size, mesh
        self.info, self.evaluator, self.samples, self._export = info, evaluator, samples, export
        self.counted, self.diagnose, self.shared = counted, diagnose, shared
        self.evaluation_batches = len(evaluator) if evaluator else 0

    def batches(self, start: int, steps: int) -> contextlib.AbstractContextManager[Iterator[Any]]:
        """Batches on the mesh, read ahead."""
        return self.loader.prefetch(start, steps, lambda rows: place(rows, self.batch_size, self.mesh))

    def update(self, state: State, batch: Any) -> tuple[State, Mapping[str, Any]]:
        """One update, begun: its metrics are still being computed."""
        with self.info.timed('step'):
            return self.step(state, self.frozen, batch | self.shared)

    def evaluate(self, state: State, step: int, advance: Callable[[], None]) -> dict[str, float]:
        """Metrics of the held-out rows."""
        assert self.evaluator is not None
        return self.evaluator.run(state['trainable'], self.frozen, advance)

    def logger(self, writer: MetricsWriter, bar: console.Bar) -> TrainLogger:
        """Logs `train/…`."""
        return TrainLogger(
            self.info,
            writer,
            bar,
            group=lambda name: 'train',
            shown={'loss': '.3f', 'busiest_expert': '.2f'},
            unit='update',
            counted=self.counted,
            diagnose=self.diagnose,
        )

    def begin(self, state: State, writer: MetricsWriter) -> None:
        """Samples of the model as it begins."""
        self._sample(state['trainable'], 0)

    def export(self, trainable: Any, step: int) -> None:
        """Samples of the model as it ended, and the model."""
        self._sample(trainable, step)
        with self.info.timed('export'):
            self._export(tree.combine(trainable, self.frozen))

    def _sample(self, trainable: Any, step: int) -> None:
        if self.samples:
            with self.info.timed('samples'):
                self.samples.write(tree.combine(trainable, self.frozen), step)


def _example(objective: Objective, rows: Any, tokenizer: Any) -> list[tuple[str, bool]]:
    """The first example as the objective shows it, of each source of a mixture, after its label."""
    if not objective.preview:
        return []
    if not isinstance(rows, Mixture):
        return list(objective.preview(rows, tokenizer))
    shown = []
    for label, part in rows.parts.items():
        shown += [(f'[{label}] ', False), *objective.preview(part, tokenizer), ('\n', False)]
    return shown


def open_trainer(
    config: Settings, workdir: pathlib.Path, mesh: Mesh, command: Command
) -> tuple[Trainer, Callable[[], None], Callable[[int, Mapping[str, Any]], None]]:
    """The trainer of a recipe, and what prints its first and its last lines."""
    info = setup.run_info(config, command, mesh)
    check(config, mesh)
    objective, method, cache = specs.objective(config), specs.method(config), workdir / 'cache'
    with info.timed('load'):
        bundle = load_model(specs.model_spec(config), mesh)
        shared = teacher.load(config, mesh)
    reference = setup.reference_logps(config, mesh, bundle, cache)
    vocab_size = bundle.model.config.vocab_size
    with info.timed('data'):
        rows = objective.dataset('train', bundle.tokenizer, cache, vocab_size)
        rows_per_epoch = len(rows)
    steps = config.train.steps or max(1, math.ceil(config.train.epochs * rows_per_epoch / config.train.batch_size))
    observer = setup.observer(config, workdir, info, steps, 'update')
    with info.timed('data'):
        rows = reference.complete(rows, 'train')
    loader = Loader(rows, config.train.batch_size, config.seed, shuffle=True)

    reached = setup.reached(config, bundle)
    trainable, frozen = setup.split(config, bundle)
    program = setup.program(config, mesh, bundle, trainable, objective, steps, shared)
    state = program.init_state(trainable)
    info.flops_per_token = setup.training_flops(config, bundle.model, objective, shared)
    info.describe_model(bundle.model, bundle.params, trainable, state['opt_state'])
    with info.timed('compile'):
        accumulate, step = setup.compiled_step(config, mesh, program, state, frozen)

    evaluator = gzip = None
    if config.data.eval:
        with info.timed('data'):
            held_out = reference.complete(objective.dataset('eval', bundle.tokenizer, cache, vocab_size), 'eval')
        gzip = getattr(getattr(held_out, 'tokens', None), 'gzip_bits_per_byte', None)
        size = config.eval.batch_size or config.train.batch_size // accumulate
        evaluator = make_evaluator(
            objective.objective,
            mesh,
            held_out,
            program.eval_step(),
            size,
            program.statistics,
            config.eval.batches,
            setup.position_bounds(config),
            shared,
        )
    samples = setup.sample_callback(config, mesh, bundle, workdir)
    metric = config.eval.metric
    checkpoints = setup.checkpoints(config, workdir, metric)

    def diagnose(number: int, what: str, before: list[dict[str, float]]) -> str:
        cause = divergence.cause(number, before, config.optimizer, config.model.path)
        return f'{cause}; {divergence.last_good(checkpoints, workdir)}'

    # The trainer alone owns the weights from here on: each update consumes them.
    bundle = setup.without_params(bundle)
    task = TrainTask(
        step,
        frozen,
        loader,
        config.train.batch_size,
        mesh,
        info,
        evaluator,
        samples,
        lambda params: save_tuned(workdir, method, bundle, params, config.export.dtype),
        objective.objective.counted,
        diagnose,
        shared,
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
    pieces = _example(objective.objective, rows, bundle.tokenizer)
    data, memory = data_facts(rows), compiled_memory(step)
    kernels = bundle.model.kernels
    if titles := setup.declared(config).titles:
        info.facts['titles'] = dict(titles)
    info.facts |= {'steps': steps, 'accumulate': accumulate, 'gzip_bits_per_byte': gzip}

    def first_lines() -> None:
        mixture = announce.mixture_facts(rows, steps * config.train.batch_size)
        of = None if mixture else data['rows']
        updates = announce.updates_line(
            steps, accumulate, config.train.batch_size, info.tokens_per_step, config.data.seq_len, of
        )
        announce.announce(
            info,
            workdir,
            data=data,
            kernels=kernels,
            memory=memory,
            updates=updates,
            optimizer=config.optimizer,
            mixture=mixture,
            targets=reached,
        )
        if pieces:
            announce.show_example(info, pieces)

    def last_lines(exported: int, metrics: Mapping[str, Any]) -> None:
        announce.conclude(info, workdir, exported, metrics, gzip=gzip, auto_class=objective.objective.auto_class)

    return trainer, first_lines, last_lines
