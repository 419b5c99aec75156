"""What every task that changes weights has in common: resuming, evaluating, saving, stopping, and the end of a run."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxtune import report
from jaxtune.common import console, preemption
from jaxtune.errors import UserError
from jaxtune.methods import apply
from jaxtune.metrics.writer import MetricsWriter, peak_memory_bytes
from jaxtune.parallel.aot import compile_step
from jaxtune.pretrained.load import Assembly
from jaxtune.recipe.workdir import stored_signature
from jaxtune.tasks import export
from jaxtune.training.checkpoint import Checkpoints
from jaxtune.training.evaluator import rises
from jaxtune.training.program import Program, make_program
from jaxtune.training.run_info import RunInfo
from jaxtune.training.step import State
from jaxtune.weights import tree


class Run:
    """One run, from its recipe to its exported model.

    A task's own run sets what is named here, and has `_loop`.

    Attributes:
      config, workdir, mesh, command: as they are handed in.
      info: its first and last lines, and where the time goes.
      parts: model and tokenizer; their parameters belong to the state.
      program: its update.
      step: that, compiled; of `accumulate` micro-batches.
      state: what an update changes; the only owner of the trained weights, for it is donated.
      frozen: the half of the tree that stays.
      steps: of the whole run.
      evaluator: has a length, in batches; or None.
      checkpoints: where the state is saved.
      start: the step to go on from.
      memory: what the loop remembers beside the state: the best value so far, evaluations since, why it ended.
    """

    config: ConfigDict
    mesh: Mesh
    info: RunInfo
    parts: Assembly
    program: Program
    step: Callable
    accumulate: int
    state: State
    frozen: Any
    steps: int
    evaluator: Any = None
    start = 0

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, mesh: Mesh, command, metric: str):
        self.config, self.workdir, self.mesh, self.command = config, workdir, mesh, command
        self.metric = metric  # what "better" means
        self.memory: dict[str, Any] = {'best': None, 'bad_evaluations': 0, 'stopped': False, 'metrics': {}}

    def _open_checkpoints(self) -> None:
        self.checkpoints = Checkpoints(
            self.workdir / 'checkpoints',
            self.config.checkpoint.keep,
            self.metric,
            rises(self.metric),
            stored_signature(self.workdir),
        )

    def _open_program(self, parts: Assembly, updates: int, objective: ModuleType | None = None) -> None:
        """Makes the state and compiles the update of it.

        Args:
          parts: with the parameters of the start.
          updates: of the whole run.
          objective: what is learnt, where not `config.objective`.
        """
        config, mesh = self.config, self.mesh
        trainable, self.frozen = apply.partition(config, parts.params, parts.whole)
        self.program = make_program(config, mesh, parts.model, trainable, updates, parts.fresh, objective)
        self.state = self.program.init_state(trainable)
        # The state alone owns the trained weights from here on: it is donated to each update.
        self.parts = dataclasses.replace(parts, params=None)
        self.info.describe_model(parts.model, parts.params, trainable, self.state['opt_state'])
        with self.info.timed('compile'):
            args = (self.state, self.frozen, self.program.batch_shapes())
            micro_rows = config.train.batch_size // (mesh.shape['data'] * mesh.shape['fsdp'])
            self.accumulate, self.step = compile_step(
                self.program.train_step, args, config.train.accumulate, micro_rows
            )

    def to_the_end(self) -> dict:
        """Resumes where a checkpoint is, trains, exports, reports; returns `result.json`'s content."""
        self._resume()
        self.writer = MetricsWriter(self.workdir, resume_step=self.start or None, wandb=self.config.log.wandb)
        self.info.announce(self)
        step = self.start
        if not step:
            self._begin()
        try:
            with preemption.deferred():
                if step < self.steps and not self.memory['stopped']:
                    step = self._loop()
                self.checkpoints.wait()
                if preemption.waiting():
                    self._leave(step)
        except preemption.Interrupted:  # where the state cannot be saved as one that an evaluation has seen
            console.note(f'stopped by {preemption.name()}: the same command continues from the last checkpoint')
            preemption.leave()
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self.checkpoints.close()
            raise
        finally:
            self.writer.close()
            self.info.write(self.workdir)
        result = self._finish(step)
        self.checkpoints.close()
        return result

    def _begin(self) -> None:
        """Before the first step."""

    def _loop(self) -> int:
        """Trains; returns the last step."""
        raise NotImplementedError

    def _end(self, trainable: Any, step: int) -> None:
        """After the last step, with the weights that are exported and the step that they are of."""

    def _measure(self, step: int, advance: Callable[[], None]) -> dict[str, float]:
        """Metrics of an evaluation."""
        raise NotImplementedError

    def _model(self, trainable: Any) -> Any:
        """The parameters to export."""
        return tree.combine(trainable, self.frozen)

    def _resume(self) -> None:
        if self.checkpoints.newest() is None:
            return
        self.state = None  # frees its memory for the one that is read
        with self.info.timed('checkpoint'):
            found = self.checkpoints.restore_newest(self.program.shapes, self.program.placed)
        self.start, self.state, self.memory = found
        if self.start < self.steps and not self.memory['stopped']:
            console.note(f'continuing from checkpoint {self.start} of {self.steps}')

    def _due(self, step: int) -> dict[str, bool]:
        """What is to be done after a step: `log`, `eval`, `save`."""
        config = self.config
        every = {'log': config.log.every, 'save': config.checkpoint.every}
        every['eval'] = config.eval.every if self.evaluator else 0
        last = step == self.steps
        return {name: last or bool(n and step % n == 0) for name, n in every.items()}

    def _settle(self, step: int, due: dict[str, bool], stop: bool) -> tuple[bool, bool]:
        """Evaluates and saves after a step, and leaves if it is to stop.

        Returns:
          `(ended, paused)`: whether this was the last step, and whether it took time that was no training.
        """
        improved, scores = False, {}
        if evaluates := due['eval'] and bool(self.evaluator):
            improved, scores = self._evaluate(step)
        ended = step == self.steps or self.memory['stopped']
        saves = due['save'] or stop or ended or improved or (due['eval'] and not self.config.checkpoint.every)
        if saves:
            if not self.workdir.is_dir():
                raise FileNotFoundError(self.workdir)  # Orbax would make it anew
            with self.info.timed('checkpoint'):
                self.checkpoints.save(step, self.state, self.memory, scores)
        if stop and not ended:
            self._leave(step)
        return ended, evaluates or saves

    def _evaluate(self, step: int) -> tuple[bool, dict[str, float]]:
        """Evaluates and writes the metrics; returns whether they are the best so far, and them."""
        config = self.config
        with self.info.timed('eval'), console.progress(len(self.evaluator), 'evaluate', 'batch') as bar:
            metrics = self._measure(step, bar.advance)
        if self.metric not in metrics:
            raise UserError(f'eval.metric={self.metric!r}: expected one of {", ".join(sorted(metrics))}')
        value, memory = metrics[self.metric], self.memory
        best = memory['best']
        better = best is None or (value > best if rises(self.metric) else value < best)
        memory['best'] = value if better else best
        memory['bad_evaluations'] = 0 if better else memory['bad_evaluations'] + 1
        memory['stopped'] = bool(config.eval.patience and memory['bad_evaluations'] >= config.eval.patience)
        memory['metrics'] = metrics
        self.writer.write(step, metrics)
        if memory['stopped']:
            console.note(
                f'stopping at update {step}: {memory["bad_evaluations"]} evaluations without a better '
                f'{self.metric} than {memory["best"]:.4f}'
            )
        return better, metrics

    def _leave(self, step: int) -> None:
        """Ends the program after a step whose state is saved, or is being saved."""
        self.checkpoints.wait()
        saved = 'checkpoint saved, the same command continues' if step else 'the same command begins anew'
        console.note(f'stopped by {preemption.name()} after update {step}: {saved}')
        self.info.write(self.workdir)
        report.write_report(self.workdir)
        preemption.leave()

    def _leave_inside(self, step: int) -> None:
        """Ends the program in the middle of the step after this one, whose state is untouched."""
        if step and self.checkpoints.newest() != step:
            self.checkpoints.save(step, self.state, self.memory, {})
        self._leave(step)

    def _finish(self, step: int) -> dict:
        """Exports the model and writes the result and the report."""
        config, task = self.config, self.config.task
        exported, trainable = step, self.state['trainable']
        best = self.checkpoints.best() if self.evaluator else None
        if config.eval.patience and best is not None and best != step:
            state, _ = self.checkpoints.restore(best, self.program.shapes, self.program.placed)
            exported, trainable = best, state['trainable']
        self._end(trainable, exported)
        with self.info.timed('export'):
            export.save_tuned(self.workdir, config, self.parts, self._model(trainable))
        metrics = {**self.writer.latest(), **self.memory['metrics'], 'memory/peak_bytes': peak_memory_bytes()}
        if not console.is_primary():
            return {'task': task, 'status': 'done', 'step': step, 'metrics': metrics}
        self.info.write(self.workdir)
        result = report.finish(self.workdir, task, step, metrics)
        self.info.close(self, exported, metrics)
        return result
