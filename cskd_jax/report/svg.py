"""Charts as SVG text: curves with bands, and scattered points; told apart by color and by dash or mark."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

COLORS = 8  # classes c0 to c7 of style.css: the palette of Okabe and Ito
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "14 4")
# Drawn from the position of the point, about 6 units wide: circle, square, triangles, diamond, plus, cross, bar.
_MARKS = (
    "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "m-2.7-2.7h5.4v5.4h-5.4z",
    "m0-3.4l3.2 5.6h-6.4z",
    "m0-3.8l3.4 3.8l-3.4 3.8l-3.4-3.8z",
    "m0 3.4l3.2-5.6h-6.4z",
    "m-1-3.2h2v2.2h2.2v2h-2.2v2.2h-2v-2.2h-2.2v-2h2.2z",
    "m-3.2-1.2h6.4v2.4h-6.4z",
)
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 320, 52, 40, 10, 12


class Curve(NamedTuple):
    """A line with a band.

    Attributes:
      label: for the legend.
      x: float [N].
      y: float [N].
      half_band: float [N], or None for no band.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    half_band: np.ndarray | None


def curves(lines: Sequence[Curve], x_label: str, y_label: str, title: str) -> str:
    """A chart of lines over a common axis."""
    low = min(float(np.min(c.y if c.half_band is None else c.y - c.half_band)) for c in lines)
    high = max(float(np.max(c.y if c.half_band is None else c.y + c.half_band)) for c in lines)
    x_ticks = ticks(min(float(c.x.min()) for c in lines), max(float(c.x.max()) for c in lines), whole=True)
    y_ticks = ticks(low, high)
    plot_width, plot_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x, y):
        column = _LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * plot_width
        return column, _TOP + plot_height - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * plot_height

    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for tick in y_ticks:
        y = place(x_ticks[0], tick)[1]
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x = place(tick, y_ticks[0])[0]
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}" text-anchor="middle">{tick:g}</text>')
    for number, curve in enumerate(lines):
        color = f"c{number % COLORS}"
        if curve.half_band is not None:
            edge = [*zip(curve.x, curve.y + curve.half_band, strict=True)]
            edge += [*zip(curve.x, curve.y - curve.half_band, strict=True)][::-1]
            parts.append(f'<path class="band {color}" d="{_path([place(*point) for point in edge])}z"/>')
    for number, curve in enumerate(lines):
        line = _path([place(*point) for point in zip(curve.x, curve.y, strict=True)])
        parts.append(f'<path class="line c{number % COLORS}" {_dash(number)} d="{line}"/>')
    middle = _TOP + plot_height / 2
    parts.append(f'<text x="{_LEFT + plot_width / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{x_label}</text>')
    parts.append(f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{y_label}</text></svg>')
    return "\n".join(parts)


def line_key(number: int) -> str:
    """The sample of line `number` for a legend."""
    path = f'<path class="line c{number % COLORS}" {_dash(number)} d="M1 6H39"/>'
    return f'<svg class="key" viewBox="0 0 40 12">{path}</svg>'


def scatter(points: np.ndarray, labels: np.ndarray, names: Mapping[int, str], title: str) -> str:
    """A square chart of points without axes.

    Args:
      points: float [N, 2] in the unit square.
      labels: int [N].
      names: {label: text}, written at the middle of the label's points; its order decides colors and marks.
      title: for who cannot see it.
    """
    side, margin = 240, 10
    places = margin + points * (side - 2 * margin)
    parts = [f'<svg class="chart" viewBox="0 0 {side} {side}" role="img" aria-label="{html.escape(title)}">']
    for number, label in enumerate(names):
        marks = "".join(f"M{x:.1f} {y:.1f}{_MARKS[number % len(_MARKS)]}" for x, y in places[labels == label])
        parts.append(f'<path class="mark c{number % COLORS}" d="{marks}"/>')
    for label, name in names.items():
        x, y = np.median(places[labels == label], axis=0)
        parts.append(f'<text class="name" x="{x:.1f}" y="{y + 5:.1f}" text-anchor="middle">{html.escape(name)}</text>')
    return "\n".join([*parts, "</svg>"])


def mark_key(number: int) -> str:
    """The mark of category `number` for a legend."""
    mark = _MARKS[number % len(_MARKS)]
    return f'<svg class="key" viewBox="0 0 12 12"><path class="mark c{number % COLORS}" d="M6 6{mark}"/></svg>'


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About five round numbers, the first not above `low` and the last not below `high`."""
    span = max(high - low, 1e-9)
    power = 10 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 6)
    step = max(1, round(step)) if whole else step
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


def _path(points):
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _dash(number):
    dash = _DASHES[number % len(_DASHES)]
    return f'stroke-dasharray="{dash}"' if dash else ""
