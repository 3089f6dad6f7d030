"""Placement of labels in charts, so that none covers another."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import isotonic_regression

_DIRECTIONS, _DISTANCES = 16, (0, 14, 22, 30, 40, 52, 66, 82, 100)
# Costs of a position: for covering a point, for covering a label, and for distance from the labeled object, in user
# units.
_POINT, _LABEL, _UNIT = 1.0, 1000.0, 0.04


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Returns positions on a line that are at least `gap` apart and as near as possible to the wanted ones.

    Args:
      wanted: Positions that the labels would have without regard to each other.
      gap: Distance between neighbors.
      low: Lowest position.
      high: Highest position, which is exceeded if the labels do not fit.
    """
    places, order = np.asarray(wanted, float), np.argsort(wanted, kind="stable")
    steps = gap * np.arange(len(places))
    shifted = isotonic_regression(places[order] - steps).x
    found = np.empty_like(places)
    found[order] = np.clip(shifted, low, max(low, high - gap * (len(places) - 1))) + steps
    return found


def place(points: np.ndarray, anchors: np.ndarray, sizes: np.ndarray, side: float) -> np.ndarray:
    """Returns centers of labels in a square chart, each near its anchor and clear of points and other labels.

    Args:
      points: float [N, 2].
      anchors: float [K, 2], positions of what the labels name.
      sizes: float [K, 2], widths and heights of the labels.
      side: Side of the square that contains the labels.

    Returns:
      float [K, 2].
    """
    angles = 2 * math.pi * np.arange(_DIRECTIONS) / _DIRECTIONS
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    offsets = np.concatenate([distance * directions for distance in _DISTANCES])
    placed: list[np.ndarray] = []
    for anchor, size in zip(anchors, sizes, strict=True):
        centers = np.clip(anchor + offsets, size / 2, side - size / 2)
        covered = (np.abs(points - centers[:, None]) < size / 2 + 2).all(axis=2).sum(axis=1)
        cost = _POINT * covered + _UNIT * np.linalg.norm(centers - anchor, axis=1)
        for other, other_size in zip(placed, sizes, strict=False):
            cost = cost + _LABEL * (np.abs(centers - other) < (size + other_size) / 2).all(axis=1)
        placed.append(centers[np.argmin(cost)])
    return np.array(placed)
