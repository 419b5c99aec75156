"""Scoring held-out data: sums over all batches, divided once."""

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune.data.loader import Loader
from jaxtune.errors import UserError
from jaxtune.objectives import Objective
from jaxtune.parallel import compiler_options, place
from jaxtune.parallel.batches import check_rows
from jaxtune.training.step import Statistics, make_statistics

# What has to be in data for a loss to be one.
NOTHING = (
    'records with something to predict: texts of two tokens at least, answers that data.seq_len does not cut off, or '
    'more of them in a batch'
)


@dataclasses.dataclass
class Evaluator:
    """Runs the evaluation step over a loader.

    Attributes:
      step: compiled `(trainable, frozen, batch) -> sums`.
      statistics: `(trainable, frozen, batch) -> {name: (sum, count)}`, whose means over all rows `step` takes; or None.
      loader: the held-out rows.
      mesh: where batches go.
      batches: at most so many; 0 = all.
      text_bytes: UTF-8 bytes of the held-out documents, where all of them are scored, else 0.
      unscored_bits: bits charged for the tokens that have no prediction (each document's first).
      counted: what the loss is a mean over.
      summarise: makes metrics of the sums that the step gives beside the loss, and their count.
      constants: further metrics, which need no model.
    """

    step: Callable
    loader: Any
    mesh: Mesh
    batches: int = 0
    text_bytes: int = 0
    unscored_bits: float = 0.0
    counted: str = 'tokens'
    summarise: Callable[[dict[str, float], float], dict[str, float]] | None = None
    constants: Mapping[str, float] = dataclasses.field(default_factory=dict)
    statistics: Callable | None = None

    def __len__(self) -> int:
        return min(self.batches, len(self.loader)) if self.batches else len(self.loader)

    def run(self, trainable: Any, frozen: Any, advance: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Metrics `eval/loss` (nats a scored token), `eval/perplexity`, `eval/tokens` and the objective's own.

        Where the objective counts something else (`pairs`), `eval/pairs` stands for the last two.

        Raises:
          UserError: there is nothing that could be scored.
        """
        means = {}
        statistics = self.statistics
        if statistics is not None:
            sums = self._sums(lambda batch: statistics(trainable, frozen, batch))
            means = {name: np.float32(total / max(count, 1.0)) for name, (total, count) in sums.items()}
        return self._metrics(self._sums(lambda batch: self.step(trainable, frozen, batch | means), advance))

    def _sums(self, step: Callable, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """What a step gives, added up over all batches."""
        size, totals, waiting = self.loader.batch_size, None, None
        for t in range(len(self)):
            batch = place(lambda low, high, t=t: self.loader.rows(t, low, high), size, self.mesh)
            ahead = step(batch)  # one batch is always under way while the next is read
            totals, waiting = _added(totals, waiting), ahead
            advance()
        return _added(totals, waiting)

    def _metrics(self, totals: dict[str, Any]) -> dict[str, float]:
        count, loss = totals.pop('count'), totals.pop('loss')
        if not count:
            raise UserError(
                f'data.eval: none of its {self.counted} is scored, and a loss over nothing is no number; expected '
                + NOTHING
            )
        mean = loss / count
        metrics = {'eval/loss': mean, f'eval/{self.counted}': int(count)}
        if self.counted == 'tokens':
            metrics['eval/perplexity'] = math.exp(min(mean, 700.0))
        if self.text_bytes and len(self) == len(self.loader):
            metrics['eval/bits_per_byte'] = (loss / math.log(2) + self.unscored_bits) / self.text_bytes
        if self.summarise is not None:
            means = self.summarise(totals, count)
        else:
            pairs = {name: value if isinstance(value, tuple) else (value, count) for name, value in totals.items()}
            means = {name: total / its_count for name, (total, its_count) in pairs.items() if its_count}
        return metrics | {f'eval/{name}': value for name, value in {**means, **self.constants}.items()}


def _added(totals: Any, sums: Any) -> Any:
    if sums is None:
        return totals
    sums = jax.tree.map(lambda value: float(np.float64(value)), sums)
    return sums if totals is None else jax.tree.map(operator.add, totals, sums)


def make_evaluator(
    objective: Objective,
    mesh: Mesh,
    rows: Any,
    step: Callable,
    batch_size: int,
    statistics: Statistics | None = None,
    batches: int = 0,
) -> Evaluator:
    """An `Evaluator` over held-out rows.

    Args:
      objective: whose loss it is.
      mesh: where batches go.
      rows: the held-out rows.
      step: compiled `(trainable, frozen, batch) -> sums`.
      batch_size: sequences a batch.
      statistics: what the loss must know of all rows before it.
      batches: at most so many; 0 = all.

    Raises:
      UserError: the mesh does not divide the batch.
    """
    check_rows(mesh, 'eval.batch_size', batch_size)
    loader = Loader(rows, batch_size, shuffle=False)
    source = getattr(rows, 'tokens', None)
    text_bytes = unscored = 0
    if source is not None:
        text_bytes = source.text_bytes
        unscored = rows.unscored_tokens * math.log2(source.vocab_size)
    return Evaluator(
        step,
        loader,
        mesh,
        batches,
        text_bytes,
        unscored,
        counted=objective.counted,
        summarise=objective.summarise,
        constants=getattr(rows, 'baselines', {}),
        statistics=statistics and jax.jit(make_statistics(statistics), compiler_options=compiler_options()),
    )
