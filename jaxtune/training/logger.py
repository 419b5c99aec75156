"""Reading the metrics of finished updates: the progress bar, `metrics.jsonl`, and the end of a run that diverged."""

import math
import time
from typing import TYPE_CHECKING

import jax

from jaxtune.errors import UserError
from jaxtune.metrics.writer import peak_memory_bytes
from jaxtune.training.evaluator import NOTHING

if TYPE_CHECKING:
    from jaxtune.tasks.train import Run


class Watch:
    """Watches a `train.Run`.

    Attributes:
      bar: the progress bar to advance.
    """

    def __init__(self, run: 'Run', bar):
        self.run, self.bar = run, bar
        self.recent: list[tuple[int, dict[str, float]]] = []
        self.restart()

    def restart(self) -> None:
        """Leaves what was not training (evaluating, saving) out of the rate."""
        self.since, self.updates = time.perf_counter(), 0

    def see(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Waits for an update's metrics.

        Raises:
          UserError: nothing was scored, or the loss or the gradient is no longer finite.
        """
        with self.run.info.timed('step'):
            values = {name: float(value) for name, value in metrics.items()}
        if not values.pop('count'):
            counted = getattr(self.run.objective, 'COUNTED', 'tokens')
            raise UserError(
                f'update {step}: none of the {counted} in its batch of data.train is scored, and nothing can be learnt '
                f'from a loss over nothing; expected {NOTHING}'
            )
        # A mean that is over nothing in this batch, such as a reward of rejected answers where there are none.
        values = {name: x for name, x in values.items() if name in ('loss', 'grad_norm') or not math.isnan(x)}
        self.recent = [*self.recent[-20:], (step, values)]
        if not (math.isfinite(values['loss']) and math.isfinite(values['grad_norm'])):
            self._diverged(step, values)
        self.updates += 1
        rate = self.updates * self.run.info.tokens_per_step / max(time.perf_counter() - self.since, 1e-9)
        self.bar.advance(1, loss=f'{values["loss"]:.3f}', tokens=f'{rate:,.0f}/s')

    def log(self, step: int) -> None:
        """Writes the newest metrics, with the speed since the last line."""
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
                'the very first batch gives it, so the weights handed in or the precision are at fault: expected '
                f'finite tensors in model.path={run.config.model.path!r}, or model.compute_dtype=float32'
            )
        elif norms and max(norms) > 10 * norms[0]:
            cause = f'the gradient norm rose from {norms[0]:.3g} to {max(norms):.3g} before it: expected a smaller '
            cause += f'optimizer.lr than {settings.lr:g}, or more warm-up than {settings.warmup_steps} updates'
        else:
            cause = (
                f'it came at once: expected a smaller optimizer.lr than {settings.lr:g}, optimizer.clip_norm > 0, or '
            )
            cause += 'model.compute_dtype=float32'
        run.checkpoints.wait()
        newest = run.checkpoints.newest()
        good = f'the last good checkpoint is {newest}' if newest is not None else 'no checkpoint was saved yet'
        raise UserError(f'update {step}: {what} is {values[what]}; {cause}; {good} (in {run.workdir}/checkpoints)')
