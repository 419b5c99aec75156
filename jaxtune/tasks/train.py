"""The training loop: `task=train`.

The step is pure and compiled once; everything with a side effect (reading data, logging, saving, stopping) is here.
"""

import functools
import math
import pathlib

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxtune import objectives
from jaxtune.common import console, preemption
from jaxtune.data.loader import Loader
from jaxtune.errors import UserError
from jaxtune.parallel import make_mesh, place
from jaxtune.parallel.batches import check_batch
from jaxtune.pretrained.load import assemble
from jaxtune.tasks import present
from jaxtune.training import run_info, sample_callback, trainer
from jaxtune.training.evaluator import Evaluator, make_evaluator
from jaxtune.training.logger import Watch
from jaxtune.weights import tree


def run(config: ConfigDict, workdir: pathlib.Path, command) -> dict:
    """Trains to the end, or until it is to stop; returns `result.json`'s content.

    Raises:
      UserError: the recipe, the data or the model is wrong, or the loss is no longer finite.
      SystemExit: status 143 after SIGTERM, 130 after Ctrl-C, with a checkpoint saved.
    """
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = Run(config, workdir, mesh, command)
        return run.to_the_end()


def check(config: ConfigDict, mesh: Mesh) -> None:
    """Refuses what the recipe alone shows to be wrong.

    Raises:
      UserError: sizes that the mesh cannot divide, or keys that are missing.
    """
    accumulate = 1 if config.train.accumulate == 'auto' else config.train.accumulate
    check_batch(mesh, config.train.batch_size, accumulate, objectives.get(config.objective).row(config))
    sample_callback.check(config)
    if not config.data.train:
        raise UserError("data.train='': expected a path, a glob, a folder, a dataset id, python-stdlib or @STAGE")
    present.check(config)


class Run(trainer.Run):
    """One training run over a loader's batches."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, mesh: Mesh, command):
        super().__init__(config, workdir, mesh, command, config.eval.metric)
        self.info = run_info.RunInfo(command, config, mesh)
        self.objective = objectives.get(config.objective)
        check(config, mesh)
        with self.info.timed('load'):
            parts = assemble(config, mesh)
        with self.info.timed('data'):
            self.rows = rows = self.objective.dataset(config, 'train', parts.tokenizer, workdir / 'cache')
        self.steps = config.train.steps or max(1, math.ceil(config.train.epochs * len(rows) / config.train.batch_size))

        self._complete = functools.partial(
            objectives.complete, config, model=parts.model, params=parts.params, mesh=mesh, cache=workdir / 'cache'
        )
        with self.info.timed('data'):
            self.rows = rows = self._complete(rows, split='train')
        self.loader = Loader(rows, config.train.batch_size, config.seed, shuffle=True)
        self._open_program(parts, self.steps)
        self.gzip_bits_per_byte: float | None = None  # of the held-out documents, to compare with
        self.evaluator = self._evaluator()
        del self._complete  # and with it the weights of the start
        self.witness = (
            sample_callback.Witness(config, workdir, mesh, self.parts) if sample_callback.wanted(config) else None
        )
        self._open_checkpoints()

    def _evaluator(self) -> Evaluator | None:
        config = self.config
        if not config.data.eval:
            return None
        with self.info.timed('data'):
            rows = self.objective.dataset(config, 'eval', self.parts.tokenizer, self.workdir / 'cache')
            rows = self._complete(rows, split='eval')
        self.gzip_bits_per_byte = getattr(getattr(rows, 'tokens', None), 'gzip_bits_per_byte', None)
        program, rows_a_batch = self.program, config.train.batch_size // self.accumulate
        return make_evaluator(config, self.mesh, rows, program.eval_step(), rows_a_batch, program.statistics)

    def _begin(self) -> None:
        self._witness(self.state['trainable'], 0)

    def _end(self, trainable, step: int) -> None:
        self._witness(trainable, step)

    def _witness(self, trainable, step: int) -> None:
        """Writes down what the model answers now."""
        if self.witness:
            with self.info.timed('generate'):
                self.witness.write(tree.combine(trainable, self.frozen), step)

    def _measure(self, step: int, advance) -> dict[str, float]:
        return self.evaluator.run(self.state['trainable'], self.frozen, advance)

    def _loop(self) -> int:
        config, pending = self.config, None
        ahead = self.loader.prefetch(
            self.start, self.steps, lambda rows: place(rows, config.train.batch_size, self.mesh)
        )
        with ahead as batches, console.progress(self.steps, 'train', 'step', initial=self.start) as bar:
            watch = Watch(self, bar)
            for done in range(self.start + 1, self.steps + 1):
                with self.info.timed('data'):
                    batch = next(batches)
                with self.info.timed('step'):
                    self.state, metrics = self.step(self.state, self.frozen, batch)
                if pending:  # read one update late, so that the devices never wait for the host
                    watch.see(*pending)
                pending = (done, metrics)
                due, stop = self._due(done), preemption.received(done)
                if any(due.values()) or stop:
                    watch.see(*pending)
                    pending = None
                if due['log']:
                    watch.log(done)
                ended, paused = self._settle(done, due, stop)
                if paused:
                    watch.restart()
                if ended:
                    return done
        return self.steps
