"""Charts of scores by epoch: one of the whole training run, and one of its end, where the curves can be told apart."""

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cskd_jax.errors import shorten
from cskd_jax.report import labels, svg

_LEFT, _BOTTOM, _TOP, _LEADER = 52, 40, 12, 26
# Widths of the charts, and the minimum height of a plot.
_WHOLE, _END, _HEIGHT = 440, 640, 300
_LONGEST = 16
# Character size and line spacing where the chart is smallest, on a phone.
_CHARACTER, _LINE = 10, 20
# The right chart shows the scores of the last part of the training; a teacher far from them would flatten the curves.
_LAST_PART, _FURTHEST = 1 / 3, 3.0
# So would a curve whose end is further from the quartiles of all ends than this many times their distance (Tukey's
# rule).
_OUTSIDE = 1.5


class Curve(NamedTuple):
    """A line with a band.

    Attributes:
      label: Name shown at its end.
      x: float [N].
      y: float [N].
      half_band: float [N], half the height of the band; None for no band.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    half_band: np.ndarray | None


class Frame(NamedTuple):
    """The mapping from numbers to positions in the chart.

    Attributes:
      x: The first and the last epoch.
      y: The lowest and the highest score shown.
      width: Width of the plot.
      height: Height of the plot.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    width: float
    height: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Returns the position in the plot, measured from the upper left corner."""
        across = (x - self.x[0]) / max(self.x[1] - self.x[0], 1e-9)
        return across * self.width, (self.y[1] - y) / (self.y[1] - self.y[0]) * self.height


def draw_whole(lines: Sequence[Curve], teacher: float | None, score: str) -> str:
    """Returns a chart of curves from their first to their last epoch, without names.

    Args:
      lines: At least one curve.
      teacher: Score of the teacher, a horizontal line; None for none.
      score: Name of the score.
    """
    edges = [curve.y if curve.half_band is None else curve.y - curve.half_band for curve in lines]
    edges += [curve.y if curve.half_band is None else curve.y + curve.half_band for curve in lines]
    values = np.concatenate([*edges, [] if teacher is None else [teacher]])
    margin = 0.04 * np.ptp(values) or 0.5
    y_range = float(values.min() - margin), float(values.max() + margin)
    frame = Frame(_epochs(lines), y_range, _WHOLE - _LEFT - 12, _HEIGHT)
    return _chart(_WHOLE, frame, lines, teacher, score, ())


def draw_end(lines: Sequence[Curve], teacher: float | None, score: str) -> str:
    """Returns a chart of the second half of the curves, with their names at their ends.

    Args:
      lines: At least one curve.
      teacher: Score of the teacher, a horizontal line; None for none.
      score: Name of the score.
    """
    y_range = visible_range(lines, teacher)
    ends = [(shown_label(curve.label), float(curve.y[-1])) for curve in lines]
    ends += [] if teacher is None else [("teacher", teacher)]
    ends = [_within(text, height, *y_range) for text, height in ends]
    first, last = _epochs(lines)
    start = max(float(x) for curve in lines for x in curve.x if x <= (first + last) / 2)
    right = _LEADER + 8 + _CHARACTER * max(len(text) for text, _ in ends)
    frame = Frame((start, last), y_range, _END - _LEFT - right, max(_HEIGHT, _LINE * len(ends)))
    return _chart(_END, frame, lines, teacher, score, _labels(ends, lines, frame))


def _chart(width, frame, lines, teacher, score, names):
    height, described = _TOP + frame.height + _BOTTOM, f"{score} by epoch: {', '.join(curve.label for curve in lines)}"
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(described)}">',
        *_axes(frame, "epoch", score),
        # A nested SVG clips everything outside of it.
        f'<svg x="{_LEFT}" y="{_TOP}" width="{frame.width}" height="{frame.height}">',
        *_curves(lines, frame),
    ]
    if teacher is not None:
        y = frame.place(frame.x[0], teacher)[1]
        parts.append(f'<path class="teacher" d="M0 {y:.1f}H{frame.width}"/>')
    return "\n".join([*parts, "</svg>", *names, "</svg>"])


def _epochs(lines):
    return min(float(curve.x[0]) for curve in lines), max(float(curve.x[-1]) for curve in lines)


def shown_label(label: str) -> str:
    """Returns the name for the end of a curve, shortened if it is too long."""
    return shorten(label, _LONGEST)


def visible_range(lines: Sequence[Curve], teacher: float | None) -> tuple[float, float]:
    """Returns the lowest and the highest score of the last third of the training, with a margin.

    Args:
      lines: At least one curve; curves that end far from most others are ignored.
      teacher: Score to include, unless the curves would then fill less than a third of the height.
    """
    first, last = _epochs(lines)
    start = last - (last - first) * _LAST_PART
    lines = _without_outsiders(lines)
    values = np.concatenate([curve.y[curve.x >= min(start, curve.x[-1])] for curve in lines])
    low, high = float(values.min()), float(values.max())
    if teacher is not None and max(high, teacher) - min(low, teacher) <= _FURTHEST * (high - low):
        low, high = min(low, teacher), max(high, teacher)
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


def _without_outsiders(lines):
    ends = [curve.y[-1] for curve in lines]
    low, high = np.quantile(ends, [0.25, 0.75])
    reach = _OUTSIDE * (high - low)
    return [curve for curve, end in zip(lines, ends, strict=True) if low - reach <= end <= high + reach]


def _within(text, score, low, high):
    """Returns a label and its height; a label outside of the chart moves to the edge, with an arrow and its score."""
    if low <= score <= high:
        return text, score
    return f"{text} {score:.1f} {'↑' if score > high else '↓'}", min(max(score, low), high)


def _axes(frame, x_label, y_label):
    for tick in svg.ticks(*frame.y):
        if frame.y[0] <= tick <= frame.y[1]:
            y = _TOP + frame.place(frame.x[0], tick)[1]
            yield f'<path class="grid" d="M{_LEFT} {y:.1f}h{frame.width}"/>'
            yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    bottom = _TOP + frame.height
    for tick in svg.ticks(*frame.x, whole=True):
        if frame.x[0] <= tick <= frame.x[1]:
            x = _LEFT + frame.place(tick, frame.y[0])[0]
            yield f'<path class="grid" d="M{x:.1f} {bottom}v4"/>'
            yield f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>'
    yield f'<text x="{_LEFT + frame.width / 2}" y="{bottom + 35}" text-anchor="middle">{html.escape(x_label)}</text>'
    middle = _TOP + frame.height / 2
    yield f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'


def _curves(lines, frame):
    for number, curve in enumerate(lines):
        if curve.half_band is not None:
            edge = [*zip(curve.x, curve.y + curve.half_band, strict=True)]
            edge += [*zip(curve.x, curve.y - curve.half_band, strict=True)][::-1]
            yield f'<path class="band {svg.color(number)}" d="{svg.path(frame.place(*point) for point in edge)}z"/>'
    for number, curve in enumerate(lines):
        line = svg.path(frame.place(*point) for point in zip(curve.x, curve.y, strict=True))
        yield f'<path class="line {svg.color(number)}"{svg.dash(number)} d="{line}"/>'


def _labels(ends, lines, frame):
    """Yields the names of the curves, each with a line from the end of its curve."""
    heights = [_TOP + frame.place(frame.x[1], y)[1] for _, y in ends]
    places = labels.spread(heights, _LINE, _TOP, _TOP + frame.height)
    edge = _LEFT + frame.width
    for number, ((text, _), height, y) in enumerate(zip(ends, heights, places, strict=True)):
        start, style = edge, "leader"
        if number < len(lines):  # Not the teacher, whose name comes last.
            style = f"leader {svg.color(number)}"
            start = _LEFT + max(0.0, frame.place(lines[number].x[-1], 0)[0])
        yield f'<path class="{style}" d="{svg.path([(start, height), (edge + _LEADER - 4, y)])}"/>'
        yield f'<text x="{edge + _LEADER}" y="{y + 4.5:.1f}">{html.escape(text)}</text>'
