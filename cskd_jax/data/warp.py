"""Images seen through an affine map, in integers: the same on every device, no matter how the batch is split."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# Magnitudes range from 0 to this number, and positions are counted in this many parts of a pixel.
WHOLE, PIXEL = 256, 2**16

Warp = Callable[[jax.Array, jax.Array], jax.Array]


def make_warp(coefficients: Callable) -> Warp:
    """Returns a function that takes the pixel (x, y) from (a x + b y + c, d x + e y + f), or black outside the image.

    The pixel nearest to that position is taken. The function maps an image int [H, W, C] and a magnitude, int32 from 0
    to WHOLE, to an image.

    Args:
      coefficients: Function of the height, the width, and the signed magnitude from -WHOLE to WHOLE, that returns the
        six coefficients in parts of a pixel.
    """

    def warp(image, magnitude):
        height, width = image.shape[:2]
        a, b, c, d, e, f = coefficients(height, width, 2 * magnitude - WHOLE)
        x, y = jnp.arange(width, dtype=jnp.int32), jnp.arange(height, dtype=jnp.int32)[:, None]
        column = (a * x + b * y + c + PIXEL // 2) // PIXEL
        row = (d * x + e * y + f + PIXEL // 2) // PIXEL
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        taken = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
        return jnp.where(inside[:, :, None], taken, 0).astype(image.dtype)

    return warp


def make_rotation(degrees: int, angles: int) -> Warp:
    """Returns a warp that rotates around the center of the image.

    Args:
      degrees: Largest angle in degrees, in either direction.
      angles: Number of angles between the largest ones, inclusive.
    """
    radians = np.deg2rad(np.linspace(-degrees, degrees, angles))
    cosines, sines = (np.rint(PIXEL * function(radians)).astype(np.int32) for function in (np.cos, np.sin))

    def coefficients(height, width, magnitude):
        index = (magnitude + WHOLE) * (angles - 1) // (2 * WHOLE)
        cosine, sine = jnp.asarray(cosines)[index], jnp.asarray(sines)[index]
        # The center is at (width - 1) / 2 and (height - 1) / 2.
        c = ((PIXEL - cosine) * (width - 1) + sine * (height - 1)) // 2
        f = ((PIXEL - cosine) * (height - 1) - sine * (width - 1)) // 2
        return cosine, -sine, c, sine, cosine, f

    return make_warp(coefficients)
