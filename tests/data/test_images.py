"""Image files into arrays of one size."""

import numpy as np
import pytest
from PIL import Image

from cskd_jax.data.images import middle_square


@pytest.mark.parametrize("size", [(512, 256), (256, 384), (500, 333), (224, 224), (1, 3)])
def test_middle_square(size):
    """Columns and rows that count up stay in order, and the middle stays the middle."""
    width, height = size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.rint(np.linspace(0, 255, width))
    ramp[..., 1] = np.rint(np.linspace(0, 255, height))[:, None]
    square = np.asarray(middle_square(Image.fromarray(ramp), 224)).astype(int)
    assert square.shape == (224, 224, 3)
    for axis, channel, side in ((1, 0, width), (0, 1, height)):
        assert (np.diff(square[..., channel], axis=axis) >= 0).all()
        first, last = square[..., channel].min(), square[..., channel].max()
        if min(size) > 3:
            assert abs(first + last - 255) <= 2
            # The part of the side that is seen: 224 of 256 resized pixels of the shorter one.
            assert (last - first) / 255 == pytest.approx(224 / 256 * min(size) / side, abs=0.02)


def test_middle_square_copies_the_middle_of_an_image_of_the_right_size():
    pixels = np.random.default_rng(0).integers(0, 256, (256, 300, 3), np.uint8)
    np.testing.assert_array_equal(middle_square(Image.fromarray(pixels), 224), pixels[16:240, 38:262])
