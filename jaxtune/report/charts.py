"""Line charts as inline SVG: readable as they stand, with values under the pointer where scripts run."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

from jaxtune.report.source import Points

# The drawing's own units; it is stretched to the page, and its strokes are not.
_WIDE, _HIGH = 1000, 1000
MOST_POINTS = 500


def downsample(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points: the ends, and the lowest and highest of each interval, so that spikes stay."""
    if len(points) <= most:
        return list(points)
    inner, buckets = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for i in range(buckets):
        bucket = inner[i * len(inner) // buckets : (i + 1) * len(inner) // buckets]
        low, high = min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])
        kept += sorted({low, high})
    return [*kept, points[-1]]


def smooth(points: Points, share: float = 0.03) -> Points:
    """A centred running mean over this share of the points, narrower towards the ends so that it does not lag."""
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    last, most = len(points) - 1, max(1, round(share * len(points) / 2))
    smoothed = []
    for i, (x, _) in enumerate(points):
        half = min(most, i, last - i)
        smoothed.append((x, (sums[i + half + 1] - sums[i - half]) / (2 * half + 1)))
    return smoothed


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within a range."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
      name: in the legend; '' leaves it out of it.
      points: in the order of x.
      color: of the stylesheet: `train`, `eval`, `plain`, or that of a phase.
      style: `line`, `faint` (a thin line behind) or `dots` (a thin line with a dot at each point).
    """

    name: str
    points: Points
    color: str = 'train'
    style: str = 'line'


class _Scale:
    """Values -> 0 … 1.

    Args:
      low: what becomes 0.
      high: what becomes 1.
      log: equal ratios are equally far apart.
      unit: ticks are round multiples of it.
    """

    def __init__(self, low: float, high: float, log: bool = False, unit: float = 1.0) -> None:
        self.log, self.unit = log, unit
        self.low, self.high = low, high if high > low else low + (abs(low) or 1.0)

    def __call__(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if not self.log:
            return [self.unit * t for t in ticks(self.low / self.unit, self.high / self.unit)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in (
            (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
            (1, 1.5, 2, 3, 4, 6, 8),
            (1, 2, 3, 5),
            (1, 2, 5),
            (1, 3),
            (1,),
        ):
            values = [round(f * 10.0**p, 12) for p in powers for f in factors]
            values = [t for t in values if self.low <= t <= self.high]
            if len(values) <= 6:
                return values
        return values[:: math.ceil(len(values) / 6)]


def _scale(values: list[float], kind: str, unit: str) -> _Scale:
    low, high = min(values), max(values)
    if kind == 'zero' and low >= 0:
        power = min(4, int(math.log(high, 1024))) if high > 1 else 0
        return _Scale(0.0, high * 1.06, unit=1024.0**power if unit == 'bytes' else 1.0)
    if low > 0 and high / low > (2 if kind == 'log' else 30):
        return _Scale(low / (high / low) ** 0.04, high * (high / low) ** 0.04, log=True)
    margin = 0.05 * (high - low)
    return _Scale(low - margin, high + margin)


@dataclasses.dataclass(frozen=True)
class Key:
    """An entry of a legend: a curve's name, how it is drawn, and its last value."""

    name: str
    color: str
    style: str
    value: str


@dataclasses.dataclass(frozen=True)
class Mark:
    """A point that is pointed out.

    Attributes:
      left, bottom: its place, in percent of the drawing.
      text: beside it.
    """

    left: float
    bottom: float
    text: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawn chart, for `chart.html.j2`.

    Attributes:
      title: what is drawn.
      large: the page's main chart.
      label: the curves in words, for those who do not see them.
      size: width and height of the drawing, in its own units.
      paths: `(class, d)` of SVG paths, in the order in which they are drawn.
      legend: of the curves that have a name.
      mark: a point to point out.
      y_labels, x_labels: `(percent, text)` of the ticks.
      data: for the page's script: `x` (its ends), `unit`, and `series`, the points of the curves of the legend.
    """

    title: str
    large: bool
    label: str
    size: tuple[int, int]
    paths: list[tuple[str, str]]
    legend: list[Key]
    mark: Mark | None
    y_labels: list[tuple[float, str]]
    x_labels: list[tuple[float, str]]
    data: dict[str, Any]


def _paths(series: Series, x: _Scale, y: _Scale, points: Points) -> list[tuple[str, str]]:
    """`(class, d)` of a curve: its line, and its dots."""
    at = [f'{_WIDE * x(a):.1f} {_HIGH * (1 - y(b)):.1f}' for a, b in points]
    line = [(f'{series.style} {series.color}', f'M{"L".join(at)}')] if len(at) > 1 else []
    if series.style != 'dots' and line:
        return line
    # A stroke of no length with round ends is a dot that stretching the drawing leaves round.
    dots = ''.join(f'M{point}h.01' for point in at) if len(at) <= 60 else ''
    return [*line, (f'dot {series.color}', dots)]


def chart(
    title: str,
    series: list[Series],
    show: Callable[[float], str],
    show_tick: Callable[[float], str],
    *,
    unit: str = '',
    kind: str = '',
    large: bool = False,
    mark: tuple[float, float, str] | None = None,
) -> Figure | None:
    """Draws curves.

    Args:
      title: what is drawn.
      series: curves over the same x: updates, or positions.
      show: a value as text, in the legend; the page's script has the same values as numbers.
      show_tick: the same, shorter, at the axis.
      unit: `percent`, `bytes` or '': how the script shows a value.
      kind: of the axis: `zero` starts at 0, `log` is logarithmic where values differ twofold, '' where thirtyfold.
      large: the page's main chart.
      mark: `(x, y, text)` of a point to point out.

    Returns:
      The figure, or None where there is nothing to draw.
    """
    series = [curve for curve in series if curve.points]
    if not series:
        return None
    xs = [a for curve in series for a, _ in curve.points]
    shown = [downsample(curve.points) for curve in series]
    first = min(xs) if min(xs) > 0.2 * max(xs) else 0
    x, y = _Scale(first, max(xs)), _scale([b for points in shown for _, b in points], kind, unit)
    paths = [('grid', f'M0 {_HIGH * (1 - y(t)):.1f}H{_WIDE}') for t in y.ticks()]
    order = {'faint': 0, 'line': 1, 'dots': 2}
    for curve, points in sorted(zip(series, shown, strict=True), key=lambda pair: order[pair[0].style]):
        paths += _paths(curve, x, y, points)
    marked = None
    if mark:
        marked = Mark(100 * x(mark[0]), 100 * y(mark[1]), mark[2])
        dot = f'M{10 * marked.left:.1f} {_HIGH - 10 * marked.bottom:.1f}h.01'
        paths += [('ring', dot), ('dot eval', dot)]
    named = [curve for curve in series if curve.name]
    ends = '; '.join(f'{curve.name} from {show(curve.points[0][1])} to {show(curve.points[-1][1])}' for curve in named)
    return Figure(
        title=title,
        large=large,
        label=f'{title}: {ends}',
        size=(_WIDE, _HIGH),
        paths=paths,
        legend=[Key(curve.name, curve.color, curve.style, show(curve.points[-1][1])) for curve in named],
        mark=marked,
        y_labels=[(100 * y(t), show_tick(t)) for t in y.ticks()],
        x_labels=[(100 * x(t), f'{t:,.0f}') for t in _whole(x)],
        data={
            'x': [x.low, x.high],
            'unit': unit,
            'series': [
                [[a, float(f'{b:.6g}')] for a, b in points]
                for curve, points in zip(series, shown, strict=True)
                if curve.name
            ],
        },
    )


def _whole(x: _Scale) -> list[float]:
    return [t for t in ticks(x.low, x.high, 5) if t == int(t)]
