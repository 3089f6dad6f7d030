"""Shared parts of the charts: colors, dashes and marks for lines and points, and round numbers for an axis."""

import math
from collections.abc import Iterable

COLORS = 8  # classes c0 to c7 of style.css: the Okabe-Ito palette
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "14 4")
# Relative to the point, about 6 units wide: circle, square, triangle, diamond, inverted triangle, plus, bar.
_MARKS = (
    "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "m-2.7-2.7h5.4v5.4h-5.4z",
    "m0-3.4l3.2 5.6h-6.4z",
    "m0-3.8l3.4 3.8l-3.4 3.8l-3.4-3.8z",
    "m0 3.4l3.2-5.6h-6.4z",
    "m-1-3.2h2v2.2h2.2v2h-2.2v2.2h-2v-2.2h-2.2v-2h2.2z",
    "m-3.2-1.2h6.4v2.4h-6.4z",
)


def color(number: int) -> str:
    """Returns the CSS class with the color of line or category `number`."""
    return f"c{number % COLORS}"


def dash(number: int) -> str:
    """Returns the attribute for the dashes of line `number`; the first lines differ in color and have no dashes."""
    pattern = _DASHES[number // COLORS % len(_DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def path(points: Iterable[tuple[float, float]]) -> str:
    """Returns the path data of a line through points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def mark(number: int) -> str:
    """Returns the path data of the mark of category `number`, relative to its point."""
    return _MARKS[number % len(_MARKS)]


def line_key(number: int) -> str:
    """Returns the sample of line `number` for a legend."""
    line = f'<path class="line {color(number)}"{dash(number)} d="M1 6H39"/>'
    return f'<svg class="key" viewBox="0 0 40 12">{line}</svg>'


def mark_key(number: int) -> str:
    """Returns the mark of category `number` for a legend."""
    return f'<svg class="key" viewBox="0 0 12 12"><path class="mark {color(number)}" d="M6 6{mark(number)}"/></svg>'


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Returns about five round numbers, from at most `low` to at least `high`."""
    span = max(high - low, 1e-9)
    power = 10 ** math.floor(math.log10(span / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 6)
    step = max(1, round(step)) if whole else step
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]
