"""The held-out loss by the position of the predicted token, as a curve over positions."""

from jaxtune.metrics import names
from jaxtune.report.charts import Figure, Points, Series, chart
from jaxtune.report.sections import axis, number
from jaxtune.report.source import Source


def figure(source: Source) -> Figure | None:
    """The newest evaluation's curve, at the middles of the buckets; after training, beside that of the first one."""
    curves = {
        bounds: points
        for name, points in source.curves.items()
        if name.startswith('eval/loss_') and (bounds := names.positions_of(name))
    }
    steps = sorted({step for points in curves.values() for step, _ in points})
    if len(curves) < 2:
        return None

    def at(step: float) -> Points:
        values = {bounds: dict(points).get(step) for bounds, points in curves.items()}
        return sorted(((low + high) / 2, value) for (low, high), value in values.items() if value is not None)

    series = [Series(f'update {steps[-1]:,.0f}' if len(steps) > 1 else 'held out', at(steps[-1]), 'eval', 'dots')]
    if len(steps) > 1:
        series.append(Series(f'update {steps[0]:,.0f}', at(steps[0]), 'plain'))
    return chart('Held-out loss by position in a document, nats a token', series, number, axis, large=True)
