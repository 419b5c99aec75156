"""The training loop: `task=train`.

The step is pure and compiled once; everything with a side effect (reading data, logging, saving, stopping) is here.
"""

import dataclasses
import functools
import math
import pathlib
import sys
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxtune import console, export, interrupt, objectives, runinfo, tuning, witness
from jaxtune.assemble import Assembly, assemble
from jaxtune.checkpoint import Checkpoints
from jaxtune.data.loader import Loader
from jaxtune.errors import UserError
from jaxtune.evaluator import Evaluator, make_evaluator, rises
from jaxtune.fitting import compile_step
from jaxtune.metrics import MetricsWriter, peak_memory_bytes
from jaxtune.parallel import make_mesh, place
from jaxtune.parallel.batches import check_batch
from jaxtune.program import make_program
from jaxtune.report import write_report
from jaxtune.watch import Watch
from jaxtune.weights import tree
from jaxtune.workdir import write_result


def run(config: ConfigDict, workdir: pathlib.Path, command) -> dict:
    """Trains to the end, or to SIGTERM; returns `result.json`'s content.

    Raises:
      UserError: the recipe, the data or the model is wrong, or the loss is no longer finite.
      SystemExit: status 143 after SIGTERM, with a checkpoint saved.
    """
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = Run(config, workdir, mesh, command)
        return run.to_the_end()


class Run:
    """One training run, from its recipe to its exported model."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, mesh: Mesh, command):
        self.config, self.workdir, self.mesh, self.command = config, workdir, mesh, command
        self.info = runinfo.RunInfo(command, config, mesh)
        self.objective = objectives.get(config.objective)
        accumulate = 1 if config.train.accumulate == 'auto' else config.train.accumulate
        check_batch(mesh, config.train.batch_size, accumulate, self.objective.row(config))
        witness.check(config)
        if not config.data.train:
            raise UserError("data.train='': expected a path, a glob, a folder, a dataset id, python-stdlib or @STAGE")

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
        trainable, self.frozen = tuning.partition(config, parts.params, parts.fresh)
        self.program = make_program(config, mesh, parts.model, trainable, self.steps, parts.fresh)
        self.state = self.program.init_state(trainable)
        # The state alone owns the trained weights from here on: it is donated to each update.
        self.parts: Assembly = dataclasses.replace(parts, params=None)
        self.info.describe_model(parts.model, parts.params, trainable, self.state['opt_state'])

        with self.info.timed('compile'):
            args = (self.state, self.frozen, self.program.batch_shapes())
            micro_rows = config.train.batch_size // (mesh.shape['data'] * mesh.shape['fsdp'])
            self.accumulate, self.step = compile_step(
                self.program.train_step, args, config.train.accumulate, micro_rows
            )
        self.gzip_bits_per_byte: float | None = None  # of the held-out documents, to compare with
        self.evaluator = self._evaluator()
        del self._complete  # and with it the weights of the start
        self.witness = witness.Witness(config, workdir, mesh, self.parts) if config.eval.samples else None
        self.checkpoints = Checkpoints(
            workdir / 'checkpoints', config.checkpoint.keep, config.eval.metric, rises(config.eval.metric)
        )
        self.start = 0
        # What the loop remembers beside the state: the best value so far, evaluations since, why it ended.
        self.memory: dict[str, Any] = {'best': None, 'bad_evaluations': 0, 'stopped': False, 'metrics': {}}

    def _evaluator(self) -> Evaluator | None:
        config = self.config
        if not config.data.eval:
            return None
        with self.info.timed('data'):
            rows = self.objective.dataset(config, 'eval', self.parts.tokenizer, self.workdir / 'cache')
            rows = self._complete(rows, split='eval')
        self.gzip_bits_per_byte = getattr(getattr(rows, 'tokens', None), 'gzip_bits_per_byte', None)
        return make_evaluator(
            config, self.mesh, rows, self.program.eval_step(), config.train.batch_size // self.accumulate
        )

    def to_the_end(self) -> dict:
        """Resumes where a checkpoint is, trains, exports, reports."""
        self._resume()
        self.writer = MetricsWriter(self.workdir, resume_step=self.start or None, wandb=self.config.log.wandb)
        self.info.announce(self)
        step = self.start
        if not step:
            self._witness(self.state['trainable'], 0)
        try:
            with interrupt.deferred():
                if step < self.steps and not self.memory['stopped']:
                    step = self._loop()
                self.checkpoints.wait()
        finally:
            self.writer.close()
            self.info.write(self.workdir)
        result = self._finish(step)
        self.checkpoints.close()
        return result

    def _witness(self, trainable, step: int) -> None:
        """Writes down what the model answers now."""
        if self.witness:
            with self.info.timed('generate'):
                self.witness.write(tree.combine(trainable, self.frozen), step)

    def _resume(self) -> None:
        newest = self.checkpoints.newest()
        if newest is not None:
            self.state = None  # frees its memory for the one that is read
            with self.info.timed('checkpoint'):
                self.state, self.memory = self.checkpoints.restore(newest, self.program.shapes, self.program.placed)
            self.start = newest
            if newest < self.steps and not self.memory['stopped']:
                console.note(f'continuing from checkpoint {newest} of {self.steps}')

    def _loop(self) -> int:
        config = self.config
        every = {
            'log': config.log.every,
            'eval': config.eval.every if self.evaluator else 0,
            'save': config.checkpoint.every,
        }
        pending = None
        ahead = self.loader.prefetch(
            self.start, self.steps, lambda rows: place(rows, config.train.batch_size, self.mesh)
        )
        with ahead as batches, console.progress(self.steps, 'train', 'step', initial=self.start) as bar:
            watch = Watch(self, bar)
            for t in range(self.start, self.steps):
                with self.info.timed('data'):
                    batch = next(batches)
                with self.info.timed('step'):
                    self.state, metrics = self.step(self.state, self.frozen, batch)
                done = t + 1
                if pending:  # read one update late, so that the devices never wait for the host
                    watch.see(*pending)
                pending = (done, metrics)
                last = done == self.steps
                due = {name: last or bool(n and done % n == 0) for name, n in every.items()}
                stop = interrupt.received(done)
                if due['eval'] or due['save'] or due['log'] or stop:
                    watch.see(*pending)
                    pending = None
                if due['log']:
                    watch.log(done)
                improved, scores = False, {}
                if due['eval'] and self.evaluator:
                    improved, scores = self._evaluate(done)
                    watch.restart()
                ended = last or self.memory['stopped']
                if due['save'] or stop or ended or improved or (due['eval'] and not every['save']):
                    with self.info.timed('checkpoint'):
                        self.checkpoints.save(done, self.state, self.memory, scores)
                    watch.restart()
                if stop and not ended:
                    self._leave(done)
                if ended:
                    return done
        return self.steps

    def _evaluate(self, step: int) -> tuple[bool, dict[str, float]]:
        """Evaluates and writes the metrics; returns whether they are the best so far, and them."""
        config = self.config
        with self.info.timed('eval'), console.progress(len(self.evaluator), 'evaluate', 'batch') as bar:
            metrics = self.evaluator.run(self.state['trainable'], self.frozen, bar.advance)
        if config.eval.metric not in metrics:
            raise UserError(f'eval.metric={config.eval.metric!r}: expected one of {", ".join(sorted(metrics))}')
        value, memory = metrics[config.eval.metric], self.memory
        best = memory['best']
        better = best is None or (value > best if rises(config.eval.metric) else value < best)
        memory['best'] = value if better else best
        memory['bad_evaluations'] = 0 if better else memory['bad_evaluations'] + 1
        memory['stopped'] = bool(config.eval.patience and memory['bad_evaluations'] >= config.eval.patience)
        memory['metrics'] = metrics
        self.writer.write(step, metrics)
        if memory['stopped']:
            console.note(
                f'stopping at update {step}: {memory["bad_evaluations"]} evaluations without a better '
                f'{config.eval.metric} than {memory["best"]:.4f}'
            )
        return better, metrics

    def _leave(self, step: int) -> None:
        self.checkpoints.wait()
        console.note(f'stopped by SIGTERM after update {step}: checkpoint saved, the same command continues')
        sys.exit(interrupt.STATUS)

    def _finish(self, step: int) -> dict:
        """Exports the model and writes the result and the report."""
        config, parts = self.config, self.parts
        exported, trainable = step, self.state['trainable']
        best = self.checkpoints.best() if self.evaluator else None
        if config.eval.patience and best is not None and best != step:
            state, _ = self.checkpoints.restore(best, self.program.shapes, self.program.placed)
            exported, trainable = best, state['trainable']
        self._witness(trainable, exported)
        with self.info.timed('export'):
            export.save_tuned(self.workdir, config, parts, tree.combine(trainable, self.frozen))
        metrics = {**self.writer.latest(), **self.memory['metrics'], 'memory/peak_bytes': peak_memory_bytes()}
        if not console.is_primary():
            return {'task': 'train', 'status': 'done', 'step': step, 'metrics': metrics}
        self.info.write(self.workdir)
        result = write_result(self.workdir, 'train', step, metrics)
        write_report(self.workdir)
        self.info.close(self, exported, metrics)
        return result
