"""A square scatter chart of points by category, with the names of the categories."""

import html
from collections.abc import Mapping

import numpy as np

from cskd_jax.errors import shorten
from cskd_jax.report import labels, svg

_SIDE, _MARGIN = 260, 8
_LONGEST = 12
# Size of a bold character on a phone, where the chart is smallest, and the distance beyond which labels get a line.
_CHARACTER, _HEIGHT, _FAR = 10, 18, 24


def draw(points: np.ndarray, categories: np.ndarray, names: Mapping[int, str], title: str) -> str:
    """Returns a chart without axes.

    Args:
      points: float [N, 2] in the unit square.
      categories: int [N].
      names: {category: name}; the order determines colors and marks.
      title: Description for readers who cannot see the chart.
    """
    places = _MARGIN + points * (_SIDE - 2 * _MARGIN)
    of = [places[categories == category] for category in names]
    texts = [shorten(name, _LONGEST) for name in names.values()]
    anchors = np.array([_middle(own) for own in of])
    sizes = np.array([(_CHARACTER * len(text) + 4, _HEIGHT) for text in texts], float)
    centers = labels.place(places, anchors, sizes, _SIDE)
    parts = [f'<svg class="chart" viewBox="0 0 {_SIDE} {_SIDE}" role="img" aria-label="{html.escape(title)}">']
    for number, own in enumerate(of):
        marks = "".join(f"M{x:.1f} {y:.1f}{svg.mark(number)}" for x, y in own)
        parts.append(f'<path class="mark {svg.color(number)}" d="{marks}"/>')
    for (x, y), anchor in zip(centers, anchors, strict=True):
        if np.hypot(*(anchor - (x, y))) > _FAR:
            parts.append(f'<path class="leader" d="{svg.path([(x, y), anchor])}"/>')
    for text, (x, y) in zip(texts, centers, strict=True):
        parts.append(f'<text class="name" x="{x:.1f}" y="{y + 5:.1f}" text-anchor="middle">{html.escape(text)}</text>')
    return "\n".join([*parts, "</svg>"])


def _middle(points):
    """Returns the point nearest to the others of its category, within the largest cluster."""
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    return points[np.argmin(np.median(distances, axis=1))]
