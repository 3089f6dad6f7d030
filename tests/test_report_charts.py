"""The charts of the report: what range they show, and where the names stand."""

import re

import numpy as np
import pytest

from cskd_jax.report import curves, labels, scatter, svg
from cskd_jax.report.curves import Curve, visible_range


def curve(label, end, epochs=9):
    """A curve that rises to its end by one in each of the last epochs, and by ten before."""
    y = end + np.minimum(0, np.arange(epochs) - epochs + 1) - 10.0 * np.maximum(0, epochs - 5 - np.arange(epochs))
    return Curve(label, np.arange(1.0, epochs + 1), y, np.full(epochs, 0.5))


def test_range_is_that_of_the_last_third():
    lines = [curve("a", 70), curve("b", 71)]
    low, high = visible_range(lines, None)
    assert low == pytest.approx(68 - 0.08 * 3), "the epochs 7 to 9 and a margin"
    assert high == pytest.approx(71 + 0.08 * 3)
    assert visible_range(lines, 73)[1] > 73, "a teacher that is near"
    assert visible_range(lines, 90) == (low, high), "one that would flatten the curves"


def test_a_method_that_fails_does_not_flatten_the_others():
    lines = [curve(str(end), end) for end in (69, 70, 71, 72)]
    assert visible_range([*lines, curve("failed", 20)], None) == visible_range(lines, None)
    chart = curves.draw_end([*lines, curve("failed", 20)], 95.0, "top-1")
    texts = re.findall(">([^<>]+)</text>", chart)
    assert {"69", "72", "failed 20.0 ↓", "teacher 95.0 ↑"} <= set(texts)


def test_one_curve_of_one_epoch():
    line = Curve("kd", np.array([1.0]), np.array([50.0]), None)
    for chart in (curves.draw_whole([line], None, "top-1"), curves.draw_end([line], None, "top-1")):
        assert "nan" not in chart
        assert "inf" not in chart


def test_every_curve_has_its_name_at_its_own_height():
    lines = [curve(f"method {number}", 70 + number / 100) for number in range(30)]
    found = re.findall(r'<text x="[^"]+" y="([^"]+)">([^<]+)</text>', curves.draw_end(lines, 71.0, "top-1"))
    heights = {name: float(height) for height, name in found}
    assert len(heights) == 31
    assert np.diff(sorted(heights.values())).min() > 19
    assert sorted(heights, key=heights.get) == ["teacher", *(line.label for line in reversed(lines))]


def test_long_names_are_shortened_and_escaped():
    chart = curves.draw_end([curve("<b>&" + 30 * "x", 70)], None, "<top>")
    assert "&lt;b&gt;&amp;xxxxxxxxxxx…</text>" in chart
    assert "<b>" not in chart
    assert "<top>" not in chart
    picture = scatter.draw(np.zeros((1, 2)), np.zeros(1, int), {0: "<b>&"}, 'a "title"')
    assert "&lt;b&gt;&amp;" in picture
    assert 'aria-label="a &quot;title&quot;"' in picture


def test_labels_on_a_line():
    np.testing.assert_allclose(labels.spread([5.0, 50.0], 10, 0, 100), [5, 50])
    np.testing.assert_allclose(labels.spread([50.0, 50.0, 50.0], 10, 0, 100), [40, 50, 60])
    np.testing.assert_allclose(labels.spread([99.0, 98.0], 10, 0, 100), [100, 90], err_msg="order and limit")
    crowded = labels.spread(np.zeros(20), 10, 0, 100)
    np.testing.assert_allclose(np.diff(crowded), 10, err_msg="beyond the limit rather than upon each other")


def test_labels_beside_clusters():
    rng = np.random.default_rng(0)
    anchors = rng.uniform(40, 220, (10, 2))
    points = np.concatenate([anchor + 4 * rng.normal(size=(30, 2)) for anchor in anchors])
    sizes = np.tile([40.0, 18.0], (10, 1))
    centers = labels.place(points, anchors, sizes, 260)
    apart = (np.abs(centers[:, None] - centers) >= sizes).any(axis=2) | np.eye(10, dtype=bool)
    assert apart.all(), "no label upon another"
    assert ((centers >= sizes / 2) & (centers <= 260 - sizes / 2)).all()
    covered = (np.abs(points - centers[:, None]) < sizes[0] / 2).all(axis=2).sum()
    at_anchors = (np.abs(points - anchors[:, None]) < sizes[0] / 2).all(axis=2).sum()
    assert covered < 0.1 * at_anchors
    np.testing.assert_array_equal(centers, labels.place(points, anchors, sizes, 260))


def test_colors_before_dashes():
    assert svg.dash(7) == ""
    assert len({(svg.color(number), svg.dash(number)) for number in range(40)}) == 40


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.93), (1, 200), (-3, 3), (66.1, 66.1)])
def test_ticks(low, high):
    ticks = svg.ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 9
