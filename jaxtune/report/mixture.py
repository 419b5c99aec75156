"""The sources of a mixture: their shares of training, and the held-out loss of each."""

import dataclasses
import itertools

from jaxtune.metrics import names
from jaxtune.report.charts import Series
from jaxtune.report.source import Source

_COLORS = ('train', 'eval', 'data', 'compile', 'checkpoint', 'load', 'export', 'plain')


@dataclasses.dataclass(frozen=True)
class MixedSource:
    """A source of a mixture, its numbers as text: '' where it has none.

    Attributes:
      label: the recipe's.
      share: of the rows of training.
      epochs: how often it was passed over.
      loss: held out, at the end.
    """

    label: str
    share: str
    epochs: str
    loss: str


def table(source: Source) -> list[MixedSource]:
    """The sources of a run by their share of training; those that are only held out come last, by name."""
    mixed = source.run.get('mixture') or {}
    rows = []
    for label in _labels(source):
        loss, own = source.metric(f'eval/loss/{label}'), mixed.get(label) or {}
        share, epochs = (own.get(name) for name in ('share', 'epochs'))
        rows.append(
            MixedSource(
                label,
                '' if share is None else f'{100 * share:.3g} %',
                '' if epochs is None else f'{epochs:.3g}',
                '' if loss is None else f'{loss:.4f}',
            )
        )
    return rows


def curves(source: Source) -> list[Series]:
    """The held-out loss of each source by update, where there is more than one of it."""
    found = {label: source.curves.get(f'eval/loss/{label}', []) for label in _labels(source)}
    shown = {label: points for label, points in found.items() if len(points) > 1}
    colors = itertools.cycle(_COLORS)
    return [Series(label, points, next(colors), 'dots') for label, points in shown.items()]


def _labels(source: Source) -> list[str]:
    mixed = dict.fromkeys(source.run.get('mixture') or {})
    held_out = sorted(filter(None, map(names.source_of, (*source.curves, *source.metrics))))
    return list(mixed | dict.fromkeys(held_out))
