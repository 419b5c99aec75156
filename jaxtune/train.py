"""The training loop: `task=train`.

The step is pure and compiled once; everything with a side effect (reading data, logging, saving, stopping) is here.
"""

import math
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from jaxtune import console, interrupt, methods, objectives, runinfo
from jaxtune.assemble import Assembly, assemble
from jaxtune.checkpoint import Checkpoints
from jaxtune.compiled import compile_step
from jaxtune.data.loader import Loader
from jaxtune.errors import UserError
from jaxtune.evaluation import Evaluator, rises
from jaxtune.metrics import MetricsWriter, peak_memory_bytes
from jaxtune.models import hf
from jaxtune.optim import make_optimizer, schedule
from jaxtune.parallel import make_mesh, match_rules, place, shardings, state_specs
from jaxtune.parallel.batches import batch_sharding, check_batch
from jaxtune.report import write_report
from jaxtune.step import init_state, make_eval_step, make_train_step
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
        self.method = methods.get(config.method.name)
        accumulate = 1 if config.train.accumulate == 'auto' else config.train.accumulate
        check_batch(mesh, config.train.batch_size, accumulate, config.data.seq_len)
        if not config.data.train:
            raise UserError("data.train='': expected a path, a glob, a folder, a dataset id, python-stdlib or @STAGE")

        with self.info.timed('load'):
            parts = assemble(config, mesh)
        self.parts: Assembly = parts
        with self.info.timed('data'):
            rows = self.objective.dataset(config, 'train', parts.tokenizer, workdir / 'cache')
        self.loader = Loader(rows, config.train.batch_size, config.seed, shuffle=True)
        self.steps = config.train.steps or max(1, math.ceil(config.train.epochs * len(rows) / config.train.batch_size))

        params = self.method.init(parts.params, config.method, jax.random.key(config.seed))
        trainable, self.frozen = tree.partition(params, self.method.trains)
        self.optimizer = make_optimizer(config.optimizer, self.steps, parts.fresh)
        self.state, self.shapes, self.placed = self._state(trainable)
        self.info.describe_model(parts.model, params, trainable, self.state['opt_state'])

        self.accumulate, self.step = self._compile_train()
        self.evaluator = self._evaluator()
        self.checkpoints = Checkpoints(
            workdir / 'checkpoints', config.checkpoint.keep, config.eval.metric, rises(config.eval.metric)
        )
        self.start = 0
        # What the loop remembers beside the state: the best value so far, evaluations since, why it ended.
        self.memory: dict[str, Any] = {'best': None, 'bad_evaluations': 0, 'stopped': False, 'metrics': {}}

    def _loss(self, params, batch, rng):
        return self.objective.loss(self.parts.model, params, batch, rng)

    def _state(self, trainable):
        """The state on the mesh, with its shapes and shardings."""
        specs = match_rules(trainable, self.mesh)
        shapes = jax.eval_shape(lambda tree: init_state(tree, self.optimizer), trainable)
        opt_specs = state_specs(shapes['opt_state'], trainable, specs)
        placed = shardings({'step': P(), 'trainable': specs, 'opt_state': opt_specs}, self.mesh)
        opt_state = jax.jit(self.optimizer.init, out_shardings=placed['opt_state'])(trainable)
        step = jax.device_put(np.zeros((), np.int32), placed['step'])
        return {'step': step, 'trainable': trainable, 'opt_state': opt_state}, shapes, placed

    def _batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        row = self.loader.rows(0, 0, 1)
        return {
            name: jax.ShapeDtypeStruct(
                (batch_size, *value.shape[1:]), value.dtype, sharding=batch_sharding(self.mesh, value.ndim)
            )
            for name, value in row.items()
        }

    def _compile_train(self):
        """The compiled update and the number of micro-batches it runs in."""
        config = self.config

        def make(accumulate: int):
            step = make_train_step(
                self._loss,
                self.optimizer,
                schedule(config.optimizer, self.steps),
                seed=config.seed,
                accumulate=accumulate,
                clip_norm=config.optimizer.clip_norm,
            )
            return jax.jit(step, donate_argnums=0, out_shardings=(self.placed, None))

        batch = self._batch_shapes(config.train.batch_size)
        with self.info.timed('compile'):
            rows = self.mesh.shape['data'] * self.mesh.shape['fsdp']
            return compile_step(
                make, (self.state, self.frozen, batch), config.train.accumulate, config.train.batch_size // rows
            )

    def _evaluator(self) -> Evaluator | None:
        config = self.config
        if not config.data.eval:
            return None
        rows = self.objective.dataset(config, 'eval', self.parts.tokenizer, self.workdir / 'cache')
        return make_evaluator(config, self.mesh, rows, self._loss, config.train.batch_size // self.accumulate)

    def to_the_end(self) -> dict:
        """Resumes where a checkpoint is, trains, exports, reports."""
        self._resume()
        self.writer = MetricsWriter(self.workdir, resume_step=self.start or None, wandb=self.config.log.wandb)
        self.info.announce(self)
        step = self.start
        try:
            with interrupt.deferred():
                if step < self.steps and not self.memory['stopped']:
                    step = self._loop()
                self.checkpoints.wait()
        finally:
            self.writer.close()
        self.checkpoints.close()
        return self._finish(step)

    def _resume(self) -> None:
        newest = self.checkpoints.newest()
        if newest is not None:
            with self.info.timed('checkpoint'):
                self.state, self.memory = self.checkpoints.restore(newest, self.shapes, self.placed)
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
        watch = _Watch(self)
        batches = self.loader.prefetch(self.start, self.steps)
        with console.progress(self.steps, 'train', 'step', initial=self.start) as bar:
            watch.bar = bar
            for t in range(self.start, self.steps):
                with self.info.timed('data'):
                    local = next(batches)
                    batch = place(lambda low, high, local=local: local(low, high), config.train.batch_size, self.mesh)
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
                improved = False
                if due['eval'] and self.evaluator:
                    improved = self._evaluate(done)
                    watch.restart()
                ended = last or self.memory['stopped']
                if due['save'] or stop or ended or improved or (due['eval'] and not every['save']):
                    with self.info.timed('checkpoint'):
                        self.checkpoints.save(done, self.state, self.memory, self.memory['metrics'])
                    watch.restart()
                if stop and not ended:
                    self._leave(done)
                if ended:
                    return done
        return self.steps

    def _evaluate(self, step: int) -> bool:
        """Evaluates, writes the metrics, and returns whether they are the best so far."""
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
        return better

    def _leave(self, step: int) -> None:
        self.checkpoints.wait()
        self.writer.close()
        console.note(f'stopped by SIGTERM after update {step}: checkpoint saved, the same command continues')
        sys.exit(interrupt.STATUS)

    def _finish(self, step: int) -> dict:
        """Exports the model and writes the result and the report."""
        config, parts = self.config, self.parts
        exported, trainable = step, self.state['trainable']
        best = self.checkpoints.best() if self.evaluator else None
        if config.eval.patience and best is not None and best != step:
            state, _ = self.checkpoints.restore(best, self.shapes, self.placed)
            exported, trainable = best, state['trainable']
        params = self.method.merge(tree.combine(trainable, self.frozen))
        with self.info.timed('export'):
            extra = parts.folder or None
            hf.save(self.workdir / 'export', parts.model, params, extra_files_from=extra)
            if console.is_primary():
                parts.tokenizer.save_pretrained(str(self.workdir / 'export'))
        metrics = {**self.writer.latest(), **self.memory['metrics'], 'memory/peak_bytes': peak_memory_bytes()}
        if not console.is_primary():
            return {'task': 'train', 'status': 'done', 'step': step, 'metrics': metrics}
        self.info.write(self.workdir)
        result = write_result(self.workdir, 'train', step, metrics)
        write_report(self.workdir)
        self.info.close(self, exported, metrics)
        return result


class _Watch:
    """Reads the metrics of finished updates: progress, `metrics.jsonl`, and the end of a run that diverged."""

    def __init__(self, run: Run):
        self.run, self.bar = run, None
        self.recent: list[tuple[int, dict[str, float]]] = []
        self.restart()

    def restart(self) -> None:
        """Leaves what was not training (evaluating, saving) out of the rate."""
        self.since, self.updates = time.perf_counter(), 0

    def see(self, step: int, metrics: dict[str, jax.Array]) -> None:
        with self.run.info.timed('step'):
            values = {name: float(value) for name, value in metrics.items()}
        self.recent = [*self.recent[-20:], (step, values)]
        if not (math.isfinite(values['loss']) and math.isfinite(values['grad_norm'])):
            self._diverged(step, values)
        self.updates += 1
        rate = self.updates * self.run.info.tokens_per_step / max(time.perf_counter() - self.since, 1e-9)
        self.bar.advance(1, loss=f'{values["loss"]:.3f}', tokens=f'{rate:,.0f}/s')

    def log(self, step: int) -> None:
        values = self.recent[-1][1]
        metrics = {f'train/{name}': value for name, value in values.items()}
        seconds = time.perf_counter() - self.since
        if self.updates:
            metrics |= self.run.info.speed(self.updates / max(seconds, 1e-9))
        metrics['memory/peak_bytes'] = peak_memory_bytes()
        self.run.writer.write(step, metrics)
        self.restart()

    def _diverged(self, step: int, values: dict[str, float]) -> None:
        run, before = self.run, [metrics for _, metrics in self.recent[:-1]]
        what = 'loss' if not math.isfinite(values['loss']) else 'grad_norm'
        settings = run.config.optimizer
        norms = [metrics['grad_norm'] for metrics in before]
        if not before and step == 1:
            cause = (
                'the very first batch gives it, so the weights handed in or the precision are at fault: expected finite '
                f'tensors in model.path={run.config.model.path!r}, or model.compute_dtype=float32'
            )
        elif norms and max(norms) > 10 * norms[0]:
            cause = f'the gradient norm rose from {norms[0]:.3g} to {max(norms):.3g} before it: expected a smaller '
            cause += f'optimizer.lr than {settings.lr:g}, or more warm-up than {settings.warmup_steps} updates'
        else:
            cause = f'it came at once: expected a smaller optimizer.lr than {settings.lr:g}, optimizer.clip_norm > 0, or '
            cause += 'model.compute_dtype=float32'
        run.checkpoints.wait()
        newest = run.checkpoints.newest()
        good = f'the last good checkpoint is {newest}' if newest is not None else 'no checkpoint was saved yet'
        raise UserError(f'update {step}: {what} is {values[what]}; {cause}; {good} (in {run.workdir}/checkpoints)')


def make_evaluator(config: ConfigDict, mesh: Mesh, rows, loss, batch_size: int) -> Evaluator:
    """An `Evaluator` over held-out rows, in batches of `eval.batch_size` or the size given."""
    batch_size = config.eval.batch_size or batch_size
    per = mesh.shape['data'] * mesh.shape['fsdp']
    if batch_size % per:
        raise UserError(f'eval.batch_size={batch_size}: expected a multiple of mesh.data x mesh.fsdp = {per}')
    loader = Loader(rows, batch_size, config.seed, shuffle=False)
    source = getattr(rows, 'tokens', None)
    text_bytes = unscored = 0
    if source is not None:
        text_bytes = source.text_bytes
        unscored = rows.unscored_tokens * math.log2(source.vocab_size)
    step = jax.jit(make_eval_step(loss))
    return Evaluator(step, loader, mesh, config.eval.batches, text_bytes, unscored)
