"""Reading the metrics of finished steps: the progress bar, `metrics.jsonl`, and the end of a run that diverged."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.common.console import Bar
from jaxtune.errors import UserError
from jaxtune.metrics.writer import MetricsWriter, peak_memory_bytes
from jaxtune.training.evaluator import NOTHING
from jaxtune.training.run_info import RunInfo

Values = dict[str, float]
# `(step, what is not finite, metrics of the steps before) -> cause and remedy`
Diagnose = Callable[[int, str, list[Values]], str]


class TrainLogger:
    """Logs the steps of a run.

    Args:
      info: of the run, which knows the tokens of a step.
      writer: of its metrics.
      bar: to advance.
      group: a metric's name -> what stands before it in `metrics.jsonl`.
      shown: metrics on the bar: name -> format.
      unit: what a step is called.
      counted: what the loss is a mean over.
      diagnose: what a loss that is not finite comes from.
    """

    def __init__(
        self,
        info: RunInfo,
        writer: MetricsWriter,
        bar: Bar,
        *,
        group: Callable[[str], str],
        shown: Mapping[str, str],
        unit: str,
        counted: str,
        diagnose: Diagnose,
    ) -> None:
        self.info, self.writer, self.bar = info, writer, bar
        self.group, self.shown, self.unit, self.counted, self.diagnose = group, shown, unit, counted, diagnose
        self.recent: list[tuple[int, Values]] = []
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self.restart()

    def restart(self) -> None:
        """Leaves what was not training (evaluating, saving) out of the rate."""
        self._since, self._steps, self._tokens = time.perf_counter(), 0, 0.0

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes a step's metrics and reads those of the step before, so that the devices never wait for the host."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the newest metrics.

        Raises:
          UserError: nothing was scored, or the loss or the gradient is no longer finite.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        with self.info.timed('step'):
            values = {name: float(value) for name, value in metrics.items()}
        if not values.pop('count', 1.0):
            raise UserError(
                f'{self.unit} {step}: none of the {self.counted} in its batch of data.train is scored, and nothing can '
                f'be learnt from a loss over nothing; expected {NOTHING}'
            )
        self._steps += 1
        self._tokens += values.pop('tokens', self.info.tokens_per_step)
        # A mean that is over nothing in this batch, such as a reward of rejected answers where there are none.
        values = {name: x for name, x in values.items() if name in ('loss', 'grad_norm') or not math.isnan(x)}
        self.recent = [*self.recent[-20:], (step, values)]
        wrong = next((name for name in ('loss', 'grad_norm') if not math.isfinite(values[name])), None)
        if wrong is not None:
            cause = self.diagnose(step, wrong, [metrics for _, metrics in self.recent[:-1]])
            raise UserError(f'{self.unit} {step}: {wrong} is {values[wrong]}; {cause}')
        rate = self._tokens / max(time.perf_counter() - self._since, 1e-9)
        fields = {name: format(values[name], spec) for name, spec in self.shown.items() if name in values}
        self.bar.advance(1, **fields, **({} if 'reward' in fields else {'tokens': f'{rate:,.0f}/s'}))

    def write(self, step: int) -> None:
        """Writes the newest metrics, with the speed since the last line."""
        metrics = {f'{self.group(name)}/{name}': value for name, value in self.recent[-1][1].items()}
        seconds = time.perf_counter() - self._since
        if self._steps:
            metrics |= self.info.speed(self._steps / max(seconds, 1e-9), self._tokens / self._steps)
        metrics['memory/peak_bytes'] = peak_memory_bytes()
        metrics['time/goodput'] = self.info.goodput()
        self.writer.write(step, metrics)
        self.restart()
