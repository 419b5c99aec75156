"""The one loop of every task that changes weights: update, log, evaluate, save, stop."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, Protocol

from jaxtune import report
from jaxtune.common import console, preemption
from jaxtune.errors import StepError, UserError
from jaxtune.metrics.writer import MetricsWriter, peak_memory_bytes
from jaxtune.training.checkpoint import Checkpoints
from jaxtune.training.logger import TrainLogger
from jaxtune.training.observer import Observer
from jaxtune.training.program import Program
from jaxtune.training.run_info import RunInfo
from jaxtune.training.step import State


class Task(Protocol):
    """What a run does in a step, and between steps."""

    title: str  # of the progress bar
    evaluation_batches: int  # of an evaluation; 0 = none

    def batches(self, start: int, steps: int) -> contextlib.AbstractContextManager[Iterator[Any]]:
        """What `update` takes for the steps after `start`."""
        ...

    def update(self, state: State, batch: Any) -> tuple[State, Mapping[str, Any]]:
        """One step: the new state and its metrics; the old state is donated.

        Raises:
          preemption.Interrupted: it was told to stop while the state was still untouched.
        """
        ...

    def evaluate(self, state: State, step: int, advance: Callable[[], None]) -> dict[str, float]:
        """Metrics of held-out data."""
        ...

    def logger(self, writer: MetricsWriter, bar: console.Bar) -> TrainLogger:
        """What reads the steps' metrics."""
        ...

    def begin(self, state: State, writer: MetricsWriter) -> None:
        """Before the first step of a run."""
        ...

    def export(self, trainable: Any, step: int, /) -> None:
        """After the last step, with the weights to export and the step that they are of."""
        ...


class Due(NamedTuple):
    """What is to be done after a step."""

    log: bool
    evaluation: bool
    checkpoint: bool


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When a run does what.

    Attributes:
      steps: of the whole run.
      log_every, eval_every: steps between; 0 = only at the end.
      save_every: steps between checkpoints; 0 = at every evaluation. An improvement is always saved.
      patience: evaluations without a better value before it stops; 0 = never.
      metric: what "better" means.
      higher_is_better: whether a higher value of it is.
    """

    steps: int
    log_every: int
    eval_every: int
    save_every: int
    patience: int
    metric: str
    higher_is_better: bool

    def due(self, step: int, evaluates: bool) -> Due:
        """What is to be done after a step, in a run that evaluates or not."""
        last = step == self.steps
        every = (self.log_every, self.eval_every if evaluates else 0, self.save_every)
        log, evaluation, checkpoint = (last or bool(n and step % n == 0) for n in every)
        return Due(log, evaluation and evaluates, checkpoint)


@dataclasses.dataclass
class Best:
    """What a run remembers of its evaluations.

    Attributes:
      best: the best value so far.
      bad_evaluations: evaluations since.
      stopped: whether the run ended for them.
      metrics: of the newest evaluation.
    """

    best: float | None = None
    bad_evaluations: int = 0
    stopped: bool = False
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    def update(self, metrics: dict[str, float], schedule: Schedule) -> bool:
        """Takes an evaluation; returns whether it is the best so far.

        Raises:
          UserError: it has no such metric.
        """
        metric = schedule.metric
        if metric not in metrics:
            raise UserError(f'eval.metric={metric!r}: expected one of {", ".join(sorted(metrics))}')
        value = metrics[metric]
        better = self.best is None or (value > self.best if schedule.higher_is_better else value < self.best)
        self.best = value if better else self.best
        self.bad_evaluations = 0 if better else self.bad_evaluations + 1
        self.stopped = bool(schedule.patience and self.bad_evaluations >= schedule.patience)
        self.metrics = metrics
        return better


class Trainer:
    """Runs a task from where its newest checkpoint is to its result.

    Args:
      task: what it does in a step.
      schedule: when it does what.
      program: whose state it owns.
      state: of the start; nobody else may hold it, for it is donated.
      checkpoints: where the state is saved.
      info: what the run is.
      workdir: of the run.
      observer: looks at the loop from beside it.
      wandb: metrics go to Weights & Biases too.
    """

    def __init__(
        self,
        task: Task,
        schedule: Schedule,
        program: Program,
        state: State,
        checkpoints: Checkpoints,
        info: RunInfo,
        workdir: pathlib.Path,
        observer: Observer,
        wandb: bool = False,
    ) -> None:
        self.task, self.schedule, self.program, self.checkpoints = task, schedule, program, checkpoints
        self.info, self.workdir, self.observer, self.wandb = info, workdir, observer, wandb
        self.state: State = state
        self.start, self.best = 0, Best()

    def run(self, announce: Callable[[], None], conclude: Callable[[int, Mapping[str, Any]], None]) -> dict[str, Any]:
        """Resumes, trains, exports, reports; returns `result.json`'s content.

        Args:
          announce: prints the first lines.
          conclude: prints the last lines, of the step that was exported and the final metrics.

        Raises:
          UserError: the data or the weights are wrong, or the loss is no longer finite.
          SystemExit: it was told to stop, and has saved a checkpoint.
        """
        self._resume()
        self.info.resume(self.workdir, self.start)
        self.writer = MetricsWriter(self.workdir, resume_step=self.start or None, wandb=self.wandb)
        announce()
        step = self.start
        if not step:
            self.task.begin(self.state, self.writer)
        try:
            with preemption.deferred():
                if step < self.schedule.steps and not self.best.stopped:
                    step = self.fit()
                self.checkpoints.wait()
                if preemption.waiting():
                    self._leave(step)
        except preemption.Interrupted:  # during an evaluation, or before the first update: go on from the last save
            console.note(f'stopped by {preemption.name()}: the same command continues from the last checkpoint')
            preemption.leave()
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self.checkpoints.close()
            raise
        finally:
            self.writer.close()
            self.info.write(self.workdir)
        result = self._finish(step, conclude)
        self.checkpoints.close()
        return result

    def fit(self) -> int:
        """The loop; returns the last step."""
        task, schedule, steps = self.task, self.schedule, self.schedule.steps
        bar_of_steps = console.progress(steps, task.title, 'step', initial=self.start)
        with task.batches(self.start, steps) as batches, bar_of_steps as bar, self.observer as observer:
            logger = task.logger(self.writer, bar)
            for step in observer.steps(range(self.start + 1, steps + 1), logger.flush):
                with self.info.timed('data'):
                    batch = next(batches)
                try:
                    self.state, metrics = task.update(self.state, batch)
                except preemption.Interrupted:
                    self._leave_inside(step - 1)
                except StepError:
                    self._keep(step - 1)
                    raise
                logger.add(step, metrics)
                due, stop = schedule.due(step, bool(task.evaluation_batches)), preemption.received(step)
                if any(due) or stop:
                    logger.flush()
                if due.log:
                    logger.write(step)
                improved, scores = self._evaluate(step) if due.evaluation else (False, {})
                ended = step == steps or self.best.stopped
                saves = due.checkpoint or stop or ended or improved or (due.evaluation and not schedule.save_every)
                if saves:
                    self._save(step, scores)
                if stop and not ended:
                    self._leave(step)
                if due.evaluation or saves:
                    logger.restart()
                if ended:
                    return step
        return steps

    def _resume(self) -> None:
        if self.checkpoints.newest() is None:
            return
        self.state = {}  # frees its memory for the one that is read
        with self.info.timed('checkpoint'):
            restored = self.checkpoints.restore_newest(self.program.shapes, self.program.placed)
        assert restored is not None  # there is a newest one
        self.start, self.state, best = restored
        self.best = Best(**best)
        if self.start < self.schedule.steps and not self.best.stopped:
            console.note(f'continuing from checkpoint {self.start} of {self.schedule.steps}')

    def _evaluate(self, step: int) -> tuple[bool, dict[str, float]]:
        """Evaluates and writes the metrics; returns whether they are the best so far, and them."""
        with self.info.timed('eval'), console.progress(self.task.evaluation_batches, 'evaluate', 'batch') as bar:
            try:
                metrics = self.task.evaluate(self.state, step, bar.advance)
            except StepError:
                self._keep(step)
                raise
        better = self.best.update(metrics, self.schedule)
        self.writer.write(step, metrics)
        if self.best.stopped:
            console.note(
                f'stopping at update {step}: {self.best.bad_evaluations} evaluations without a better '
                f'{self.schedule.metric} than {self.best.best:.4f}'
            )
        return better, metrics

    def _save(self, step: int, scores: dict[str, float]) -> None:
        if not self.workdir.is_dir():
            raise FileNotFoundError(self.workdir)  # Orbax would make it anew
        with self.info.timed('checkpoint'):
            self.checkpoints.save(step, self.state, dataclasses.asdict(self.best), scores)
        self.info.saved(self.workdir, step)

    def _leave(self, step: int) -> NoReturn:
        """Ends the program after a step whose state is saved, or is being saved."""
        self.checkpoints.wait()
        saved = 'checkpoint saved, the same command continues' if step else 'the same command begins anew'
        console.note(f'stopped by {preemption.name()} after update {step}: {saved}')
        if preemption.by_person():
            self.info.end = 'stopped'
        self.info.write(self.workdir)
        report.write_report(self.workdir)
        preemption.leave()

    def _leave_inside(self, step: int) -> NoReturn:
        """Ends the program in the middle of the step after this one, whose state is untouched."""
        self._save_if_new(step)
        self._leave(step)

    def _keep(self, step: int) -> None:
        """Saves the state after a step, before an error that is not its own ends the program."""
        if step:
            self._save_if_new(step)
            self.checkpoints.wait()
            console.note(f'checkpoint of update {step} saved: when what failed is mended, the same command continues')

    def _save_if_new(self, step: int) -> None:
        if step and self.checkpoints.newest() != step:
            self._save(step, {})

    def _finish(self, step: int, conclude: Callable[[int, Mapping[str, Any]], None]) -> dict[str, Any]:
        """Exports the model and writes the result and the report."""
        exported, trainable = step, self.state['trainable']
        best = self.checkpoints.best() if self.task.evaluation_batches else None
        if self.schedule.patience and best is not None and best != step:
            state, _ = self.checkpoints.restore(best, self.program.shapes, self.program.placed)
            exported, trainable = best, state['trainable']
        self.task.export(trainable, exported)
        metrics = {**self.writer.latest(), **self.best.metrics, 'memory/peak_bytes': peak_memory_bytes()}
        metrics['time/goodput'] = self.info.goodput()
        self.info.end = 'done'
        if not console.is_primary():
            return {'task': self.info.task, 'status': 'done', 'step': step, 'metrics': metrics}
        self.info.write(self.workdir)
        result = report.finish(self.workdir, self.info.task, step, metrics)
        conclude(exported, metrics)
        return result
