"""A chart of scores over the epochs, drawn so that the ends of the curves can be told apart."""

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cskd_jax.report import labels, svg

_WIDTH, _LEFT, _BOTTOM, _TOP, _LEADER = 720, 52, 40, 12, 26
_LONGEST = 16
# Size of a character and distance of lines where the chart is smallest, on a phone.
_CHARACTER, _LINE = 10, 19
# What is shown in full is the last part of the training; a teacher far from it would flatten the curves.
_LAST_PART, _FURTHEST = 1 / 3, 3.0


class Curve(NamedTuple):
    """A line with a band.

    Attributes:
      label: Name at its end.
      x: float [N].
      y: float [N].
      half_band: float [N], or None for no band.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    half_band: np.ndarray | None


class Frame(NamedTuple):
    """Where numbers lie in the chart.

    Attributes:
      x: First and last epoch.
      y: Lowest and highest score that is shown.
      width: Width of the plot.
      height: Height of the plot.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    width: float
    height: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Returns the position in the plot, from its upper left corner."""
        across = (x - self.x[0]) / max(self.x[1] - self.x[0], 1e-9)
        return across * self.width, (self.y[1] - y) / (self.y[1] - self.y[0]) * self.height


def draw(lines: Sequence[Curve], teacher: float | None, x_label: str, y_label: str, title: str) -> str:
    """Returns a chart of curves with their names at their ends.

    Args:
      lines: At least one curve.
      teacher: Score of the teacher, a horizontal line; None for none.
      x_label: Name of the horizontal axis.
      y_label: Name of the vertical axis.
      title: Description for those who cannot see the chart.
    """
    ends = [(shown_label(curve.label), float(curve.y[-1])) for curve in lines]
    low, high = visible_range(lines, teacher)
    if teacher is not None:
        ends.append(_teacher_end(teacher, low, high))
    right = _LEADER + 8 + _CHARACTER * max(len(text) for text, _ in ends)
    x_range = min(float(c.x[0]) for c in lines), max(float(c.x[-1]) for c in lines)
    frame = Frame(x_range, (low, high), _WIDTH - _LEFT - right, max(300, _LINE * len(ends)))
    height = _TOP + frame.height + _BOTTOM
    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{html.escape(title)}">',
        *_axes(frame, x_label, y_label),
        # An inner picture cuts off what lies outside of it.
        f'<svg x="{_LEFT}" y="{_TOP}" width="{frame.width}" height="{frame.height}">',
        *_curves(lines, frame),
    ]
    if teacher is not None:
        y = frame.place(x_range[0], teacher)[1]
        parts.append(f'<path class="teacher" d="M0 {y:.1f}H{frame.width}"/>')
    return "\n".join([*parts, "</svg>", *_labels(ends, lines, frame), "</svg>"])


def shown_label(label: str) -> str:
    """Returns the name at the end of a curve, which may have to be shortened."""
    return labels.shorten(label, _LONGEST)


def visible_range(lines: Sequence[Curve], teacher: float | None) -> tuple[float, float]:
    """Returns the lowest and the highest score to show: those of the last third of the training, with a margin.

    Args:
      lines: At least one curve.
      teacher: Score that is shown too, unless the others would then fill less than a third of the height.
    """
    first, last = min(c.x[0] for c in lines), max(c.x[-1] for c in lines)
    start = last - (last - first) * _LAST_PART
    values = np.concatenate([curve.y[curve.x >= min(start, curve.x[-1])] for curve in lines])
    low, high = float(values.min()), float(values.max())
    if teacher is not None and max(high, teacher) - min(low, teacher) <= _FURTHEST * (high - low):
        low, high = min(low, teacher), max(high, teacher)
    margin = 0.08 * (high - low) or 0.5
    return low - margin, high + margin


def is_cut(lines: Sequence[Curve], teacher: float | None) -> bool:
    """Returns whether a curve leaves the `visible_range`."""
    low, high = visible_range(lines, teacher)
    return any(curve.y.min() < low or curve.y.max() > high for curve in lines)


def _teacher_end(teacher, low, high):
    """Returns the label of the teacher, with its score and the direction where the line is not in the picture."""
    if low <= teacher <= high:
        return "teacher", teacher
    return f"teacher {teacher:.1f} {'↑' if teacher > high else '↓'}", min(max(teacher, low), high)


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
    yield f'<text x="{_LEFT + frame.width / 2}" y="{bottom + 35}" text-anchor="middle">{x_label}</text>'
    middle = _TOP + frame.height / 2
    yield f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{y_label}</text>'


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
    """Yields the names beside the ends, with a line from the end of each curve to its name."""
    heights = [_TOP + frame.place(frame.x[1], min(max(y, frame.y[0]), frame.y[1]))[1] for _, y in ends]
    places = labels.spread(heights, _LINE, _TOP, _TOP + frame.height)
    edge = _LEFT + frame.width
    for number, ((text, _), height, y) in enumerate(zip(ends, heights, places, strict=True)):
        start = _LEFT + frame.place(lines[number].x[-1], 0)[0] if number < len(lines) else edge
        style = f"leader {svg.color(number)}" if number < len(lines) else "leader"
        yield f'<path class="{style}" d="{svg.path([(start, height), (edge + _LEADER - 4, y)])}"/>'
        yield f'<text x="{edge + _LEADER}" y="{y + 4.5:.1f}">{html.escape(text)}</text>'
