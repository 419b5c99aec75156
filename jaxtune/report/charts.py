"""Line charts as inline SVG: readable as they stand, with values under the pointer where scripts run."""

import dataclasses
import html
import itertools
import json
import math
from collections.abc import Callable

from jaxtune.report.source import Points

# The drawing's own units; it is stretched to the page, and its strokes are not.
_WIDE, _HIGH = 1000, 1000
MOST_POINTS = 500


def downsample(points: Points, most: int = MOST_POINTS) -> Points:
    """At most so many points; of each stretch the lowest and the highest stay, so spikes do too, and so do the ends."""
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
    """A centred running mean over this share of the points; narrower towards the ends, so it never lags behind."""
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
      color: of the stylesheet: `train`, `eval`, `plain`.
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

    def __init__(self, low: float, high: float, log: bool = False, unit: float = 1.0):
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
            found = [round(f * 10.0**p, 12) for p in powers for f in factors]
            found = [t for t in found if self.low <= t <= self.high]
            if len(found) <= 6:
                return found
        return found[:: math.ceil(len(found) / 6)]


def _scale(values: list[float], kind: str, unit: str) -> _Scale:
    low, high = min(values), max(values)
    if kind == 'zero' and low >= 0:
        power = min(4, int(math.log(high, 1024))) if high > 1 else 0
        return _Scale(0.0, high * 1.06, unit=1024.0**power if unit == 'bytes' else 1.0)
    if low > 0 and high / low > (2 if kind == 'log' else 30):
        return _Scale(low / (high / low) ** 0.04, high * (high / low) ** 0.04, log=True)
    margin = 0.05 * (high - low)
    return _Scale(low - margin, high + margin)


def _path(series: Series, x: _Scale, y: _Scale, points: Points) -> str:
    at = [f'{_WIDE * x(a):.1f} {_HIGH * (1 - y(b)):.1f}' for a, b in points]
    css = f'{series.style} {series.color}'
    line = f'<path class="{css}" d="M{"L".join(at)}" />' if len(at) > 1 else ''
    if series.style != 'dots' and len(at) > 1:
        return line
    # A stroke of no length with round ends is a dot that stretching the drawing leaves round.
    dots = ''.join(f'M{point}h.01' for point in at) if len(at) <= 60 else ''
    return f'{line}<path class="dot {series.color}" d="{dots}" />'


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
) -> str:
    """A figure.

    Args:
      title: what is drawn.
      series: curves over the same x, updates.
      show: a value as text, in the legend; the page's script has the same values as numbers.
      show_tick: the same, shorter, at the axis.
      unit: `percent`, `bytes` or '': how the script shows a value.
      kind: of the axis: `zero` starts at 0, `log` is logarithmic where values differ twofold, '' where thirtyfold.
      large: the page's main chart.
      mark: `(x, y, text)` of a point to point out.

    Returns:
      HTML; '' where there is nothing to draw.
    """
    series = [curve for curve in series if curve.points]
    if not series:
        return ''
    xs = [a for curve in series for a, _ in curve.points]
    shown = [downsample(curve.points) for curve in series]
    first = min(xs) if min(xs) > 0.2 * max(xs) else 0
    x, y = _Scale(first, max(xs)), _scale([b for points in shown for _, b in points], kind, unit)
    drawing = ''.join(f'<path class="grid" d="M0 {_HIGH * (1 - y(t)):.1f}H{_WIDE}" />' for t in y.ticks())
    order = {'faint': 0, 'line': 1, 'dots': 2}
    for curve, points in sorted(zip(series, shown, strict=True), key=lambda pair: order[pair[0].style]):
        drawing += _path(curve, x, y, points)
    note = ''
    if mark:
        left, bottom = 100 * x(mark[0]), 100 * y(mark[1])
        drawing += f'<path class="ring" d="M{10 * left:.1f} {_HIGH - 10 * bottom:.1f}h.01" />'
        drawing += f'<path class="dot eval" d="M{10 * left:.1f} {_HIGH - 10 * bottom:.1f}h.01" />'
        side = f'right:{100 - left:.2f}%' if left > 50 else f'left:{left:.2f}%'
        note = f'<span class="mark" style="{side};bottom:calc({bottom:.2f}% + 11px)">{html.escape(mark[2])}</span>'
    y_labels = ''.join(f'<span style="bottom:{100 * y(t):.2f}%">{html.escape(show_tick(t))}</span>' for t in y.ticks())
    x_labels = ''.join(f'<span style="left:{100 * x(t):.2f}%">{t:,.0f}</span>' for t in _whole(x))
    named = [curve for curve in series if curve.name]
    legend = ''.join(
        f'<span class="key">{_swatch(curve) if len(named) > 1 else ""}'
        f'<output data-of="{i}">{html.escape(show(curve.points[-1][1]))}</output></span>'
        for i, curve in enumerate(named)
    )
    label = f'{title}: ' + '; '.join(
        f'{curve.name} from {show(curve.points[0][1])} to {show(curve.points[-1][1])}' for curve in named
    )
    data = {
        'x': [x.low, x.high],
        'unit': unit,
        'series': [
            [[a, float(f'{b:.6g}')] for a, b in points]
            for curve, points in zip(series, shown, strict=True)
            if curve.name
        ],
    }
    return (
        f'<figure class="chart{" large" if large else ""}"><figcaption><b>{html.escape(title)}</b>'
        f'<span class="legend">{legend}</span></figcaption>'
        f'<div class="plot"><div class="y">{y_labels}</div><div class="area">'
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" preserveAspectRatio="none" role="img" aria-label="{html.escape(label)}">'
        f'{drawing}</svg>{note}<div class="cross"><span></span></div></div><div class="x">{x_labels}</div></div>'
        f'<script type="application/json">{json.dumps(data).replace("<", chr(92) + "u003c")}</script></figure>'
    )


def _swatch(curve: Series) -> str:
    return f'<i class="{curve.color} {curve.style}"></i>{html.escape(curve.name)} '


def _whole(x: _Scale) -> list[float]:
    return [t for t in ticks(x.low, x.high, 5) if t == int(t)]
