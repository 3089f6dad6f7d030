"""Image files into arrays of one size."""

import errno

import numpy as np
import pytest
from PIL import Image

from cskd_jax.data.images import middle_square, read_image
from cskd_jax.errors import TransientError, UserError


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


def _raising(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.EMFILE, "Too many open files"), OSError(errno.ESTALE, "Stale file handle")]
)
def test_what_may_pass_is_not_called_damage(error, tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", _raising(error))
    with pytest.raises(TransientError, match="cannot read a.png: (out of memory|.*Too many open|.*Stale)"):
        read_image(tmp_path / "a.png", "a.png", 3, None)


def test_what_must_not_be_read_is_not_called_damage(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", _raising(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(UserError, match="cannot read a.png: .*Permission denied") as error:
        read_image(tmp_path / "a.png", "a.png", 3, None)
    assert "remove" not in str(error.value)
