"""Scoring held-out data: sums over all batches, divided once."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune.data.loader import Loader
from jaxtune.data.mixture import Mixture
from jaxtune.errors import UserError
from jaxtune.models.frozen import FrozenModel
from jaxtune.objectives import Objective, by_position
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
      bounds: of the buckets of positions that the loss is given for, or None; see `objectives.by_position`.
      statistics: `(trainable, frozen, batch) -> {name: (sum, count)}`, whose means over all rows `step` takes; or None.
      loaders: the held-out rows by label; '' is that of rows without one.
      mesh: where batches go.
      batches: at most so many of each; 0 = all.
      text_bytes: UTF-8 bytes of the held-out documents, where all of them are scored, else 0.
      unscored_bits: bits charged for the tokens that have no prediction (each document's first).
      counted: what the loss is a mean over.
      summarise: makes metrics of the sums that the step gives beside the loss, and their count.
      constants: further metrics, which need no model.
      shared: what the loss finds in every batch beside its rows.
    """

    step: Callable
    loaders: Mapping[str, Loader]
    mesh: Mesh
    batches: int = 0
    text_bytes: int = 0
    unscored_bits: float = 0.0
    counted: str = 'tokens'
    summarise: Callable[[dict[str, float], float], dict[str, float]] | None = None
    constants: Mapping[str, float] = dataclasses.field(default_factory=dict)
    statistics: Callable | None = None
    bounds: np.ndarray | None = None
    shared: Mapping[str, FrozenModel] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(self._count, self.loaders.values()))

    def _count(self, loader: Loader) -> int:
        """Batches of a loader that are scored."""
        return min(self.batches, len(loader)) if self.batches else len(loader)

    def run(self, trainable: Any, frozen: Any, advance: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Metrics `eval/loss` (nats a scored token), `eval/perplexity`, `eval/tokens` and the objective's own.

        Where the objective counts something else (`pairs`), `eval/pairs` stands for the last two. Of rows with labels
        there is `eval/loss/LABEL` too; the others are over all rows together, whatever their label.

        Raises:
          UserError: there is nothing that could be scored.
        """
        added: dict[str, Any] = dict(self.shared)
        if self.bounds is not None:
            added[by_position.EDGES] = self.bounds[:-1].astype(np.int32)
        statistics = self.statistics
        if statistics is not None:
            sums = self._sums(lambda batch: statistics(trainable, frozen, batch | self.shared))
            sums = functools.reduce(_added_sums, sums.values())
            added |= {name: np.float32(total / max(count, 1.0)) for name, (total, count) in sums.items()}
        sums = self._sums(lambda batch: self.step(trainable, frozen, batch | added), advance)
        return self._metrics(sums)

    def _sums(self, step: Callable, advance: Callable[[], None] = lambda: None) -> dict[str, dict[str, Any]]:
        """What a step gives by label, added up over all batches."""
        return {label: self._sums_of(loader, step, advance) for label, loader in self.loaders.items()}

    def _sums_of(self, loader: Loader, step: Callable, advance: Callable[[], None]) -> dict[str, Any]:
        size, totals, waiting = loader.batch_size, None, None
        for t in range(self._count(loader)):
            batch = place(lambda low, high, t=t: loader.rows(t, low, high), size, self.mesh)
            ahead = step(batch)  # one batch is always under way while the next is read
            totals, waiting = _added(totals, waiting), ahead
            advance()
        return _added(totals, waiting)

    def _metrics(self, sums: dict[str, dict[str, Any]]) -> dict[str, float]:
        by_label = {}
        for label, found in sums.items():
            if not found['count']:
                raise UserError(
                    f'data.eval: none of {f"the {self.counted} of {label!r}" if label else f"its {self.counted}"} is '
                    f'scored, and a loss over nothing is no number; expected {NOTHING}'
                )
            if label:
                by_label[f'eval/loss/{label}'] = found['loss'] / found['count']
        totals = dict(functools.reduce(_added_sums, sums.values()))
        count, loss = totals.pop('count'), totals.pop('loss')
        found = totals.pop(by_position.SUMS, None)  # before `summarise`, which knows the objective's own
        mean = loss / count
        metrics = {'eval/loss': mean, **by_label, f'eval/{self.counted}': int(count)}
        if self.counted == 'tokens':
            metrics['eval/perplexity'] = math.exp(min(mean, 700.0))
        if self.text_bytes and len(self) == sum(map(len, self.loaders.values())):
            metrics['eval/bits_per_byte'] = (loss / math.log(2) + self.unscored_bits) / self.text_bytes
        if self.summarise is not None:
            means = self.summarise(totals, count)
        else:
            pairs = {name: value if isinstance(value, tuple) else (value, count) for name, value in totals.items()}
            means = {name: total / its_count for name, (total, its_count) in pairs.items() if its_count}
        means = {**means, **self.constants}
        if found is not None and self.bounds is not None:
            means |= by_position.metrics(self.bounds, found)
        return metrics | {f'eval/{name}': value for name, value in means.items()}


def _added(totals: Any, sums: Any) -> Any:
    if sums is None:
        return totals
    sums = jax.tree.map(_float64, sums)
    return sums if totals is None else _added_sums(totals, sums)


def _float64(value: Any) -> float | np.ndarray:
    array = np.asarray(value, np.float64)
    return array if array.ndim else float(array)


def _added_sums(totals: Any, sums: Any) -> Any:
    return jax.tree.map(operator.add, totals, sums)


def make_evaluator(
    objective: Objective,
    mesh: Mesh,
    rows: Any,
    step: Callable,
    batch_size: int,
    statistics: Statistics | None = None,
    batches: int = 0,
    bounds: np.ndarray | None = None,
    shared: Mapping[str, FrozenModel] | None = None,
) -> Evaluator:
    """An `Evaluator` over held-out rows.

    Args:
      objective: whose loss it is.
      mesh: where batches go.
      rows: the held-out rows, or a `Mixture` of them.
      step: compiled `(trainable, frozen, batch) -> sums`.
      batch_size: sequences a batch.
      statistics: what the loss must know of all rows before it.
      batches: at most so many, of each source; 0 = all.
      bounds: of buckets of positions, as for `Evaluator`.
      shared: what the loss finds in every batch beside its rows.

    Raises:
      UserError: the mesh does not divide the batch.
    """
    check_rows(mesh, 'eval.batch_size', batch_size)
    parts = rows.parts if isinstance(rows, Mixture) else {'': rows}
    texts = [part for part in parts.values() if getattr(part, 'tokens', None) is not None]
    text_bytes = unscored = 0
    if len(texts) == len(parts):
        text_bytes = sum(part.tokens.text_bytes for part in texts)
        unscored = sum(part.unscored_tokens * math.log2(part.tokens.vocab_size) for part in texts)
    return Evaluator(
        step,
        {label: Loader(part, batch_size, shuffle=False) for label, part in parts.items()},
        mesh,
        batches,
        text_bytes,
        unscored,
        counted=objective.counted,
        summarise=objective.summarise,
        constants=getattr(rows, 'baselines', {}),  # means, which a mixture's sources do not add up to
        bounds=bounds,
        shared=shared or {},
        statistics=statistics and jax.jit(make_statistics(statistics), compiler_options=compiler_options()),
    )
