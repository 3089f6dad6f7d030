"""Strong augmentation on the device: two operations drawn at random, as in RandAugment, and a cut-out square."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Magnitudes are drawn from 0 to this, and positions are counted in this many parts of a pixel.
_WHOLE, _PIXEL = 256, 2**16
_DEGREES, _SHEAR, _SHIFT = 30, 0.3, 0.3
_GRAY = 124


def strong_augment(images: jax.Array, key: jax.Array, positions: jax.Array) -> jax.Array:
    """Distorts colors and geometry of the images, and cuts a square out of each.

    An image goes through two operations, each drawn from: none; contrast stretched to the full range; brightness,
    color, contrast, or sharpness lowered to between 5% and 95%; colors rounded to 4 to 7 bits; colors above a threshold
    inverted; a rotation by up to 30 degrees; a shear by up to 0.3, or a shift by up to 0.3 of the side, along either
    axis, which leave black behind. Then a square of up to half of the width becomes gray. These are the operations and
    ranges of FixMatch's RandAugment, which multi-level logit distillation takes, but for its equalization of
    histograms.

    The draw for an image depends on `key` and its position in the global batch alone. The computation is in integers
    and therefore the same on every device and however the batch is split.

    Args:
      images: Images, uint8 [B, H, W, C].
      key: Key of the draws, another than that of other draws for the same positions.
      positions: Positions of the images in the global batch, int32 [B].

    Returns:
      Images, uint8 [B, H, W, C].

    References:
      Cubuk, Zoph, Shlens, Le, "RandAugment", 2020, https://arxiv.org/abs/1909.13719; Sohn et al., "FixMatch", 2020,
      https://arxiv.org/abs/2001.07685.
    """

    def one(image, position):
        keys = jax.random.split(jax.random.fold_in(key, position), 3)
        image = image.astype(jnp.int32)
        for operation_key in keys[:2]:
            kind_key, magnitude_key = jax.random.split(operation_key)
            kind = jax.random.randint(kind_key, (), 0, len(_OPERATIONS))
            magnitude = jax.random.randint(magnitude_key, (), 0, _WHOLE + 1)
            image = lax.switch(kind, _OPERATIONS, image, magnitude)
        return _cut_out(image, keys[2]).astype(jnp.uint8)

    return jax.vmap(one)(images, positions)


def _cut_out(image, key):
    height, width = image.shape[:2]
    size_key, row_key, column_key = jax.random.split(key, 3)
    side = jax.random.randint(size_key, (), 0, width // 2 + 1)

    def is_inside(key, length):
        start = jax.random.randint(key, (), 0, length) - side // 2
        at = jnp.arange(length, dtype=jnp.int32)
        return (at >= start) & (at < start + side)

    inside = is_inside(row_key, height)[:, None] & is_inside(column_key, width)
    return jnp.where(inside[:, :, None], _GRAY, image)


def _gray(image):
    """Returns the brightness of the pixels, [H, W, 1]."""
    if image.shape[-1] != 3:
        return jnp.sum(image, axis=-1, keepdims=True) // image.shape[-1]
    return jnp.sum(image * np.array([77, 150, 29], np.int32), axis=-1, keepdims=True) // _WHOLE


def _smooth(image):
    """Returns weighted means over 3x3 pixels, the middle one with weight 5."""
    height, width = image.shape[:2]
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    total = sum(padded[row : row + height, column : column + width] for row in range(3) for column in range(3))
    return (total + 4 * image + 6) // 13


def _toward(other):
    """Returns the operation that keeps between 5% and 95% of an image, the rest of which is `other(image)`."""

    def blend(image, magnitude):
        kept = 13 + magnitude * 230 // _WHOLE
        return (image * kept + other(image) * (_WHOLE - kept) + _WHOLE // 2) // _WHOLE

    return blend


def _mean_gray(image):
    return jnp.sum(_gray(image)) // (image.shape[0] * image.shape[1])


def _stretch(image, magnitude):
    del magnitude
    low, high = jnp.min(image, axis=(0, 1)), jnp.max(image, axis=(0, 1))
    return jnp.where(high > low, (image - low) * 255 // jnp.maximum(high - low, 1), image)


def _posterize(image, magnitude):
    step = jnp.left_shift(1, 4 - jnp.minimum(magnitude * 4 // _WHOLE, 3))  # 16, 8, 4 or 2
    return image // step * step


def _solarize(image, magnitude):
    return jnp.where(image < magnitude, image, 255 - image)


def _warp(coefficients):
    """Returns an operation that takes the pixel (x, y) from (a x + b y + c, d x + e y + f), or black from outside.

    Args:
      coefficients: Function of the height, the width, and the signed magnitude from -256 to 256, that returns the six
        coefficients in parts of a pixel.
    """

    def warp(image, magnitude):
        height, width = image.shape[:2]
        a, b, c, d, e, f = coefficients(height, width, 2 * magnitude - _WHOLE)
        x, y = jnp.arange(width, dtype=jnp.int32), jnp.arange(height, dtype=jnp.int32)[:, None]
        column = (a * x + b * y + c + _PIXEL // 2) // _PIXEL
        row = (d * x + e * y + f + _PIXEL // 2) // _PIXEL
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        taken = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
        return jnp.where(inside[:, :, None], taken, 0)

    return warp


def _rotation(height, width, magnitude):
    angles = np.deg2rad(np.arange(-_DEGREES, _DEGREES + 1))
    cosines, sines = (np.rint(_PIXEL * function(angles)).astype(np.int32) for function in (np.cos, np.sin))
    index = (magnitude + _WHOLE) * (2 * _DEGREES) // (2 * _WHOLE)
    cosine, sine = jnp.asarray(cosines)[index], jnp.asarray(sines)[index]
    # Around the middle, (width - 1) / 2 and (height - 1) / 2.
    c = ((_PIXEL - cosine) * (width - 1) + sine * (height - 1)) // 2
    f = ((_PIXEL - cosine) * (height - 1) - sine * (width - 1)) // 2
    return cosine, -sine, c, sine, cosine, f


def _shear(magnitude):
    return magnitude * int(_PIXEL * _SHEAR) // _WHOLE


def _shift(magnitude, length):
    return magnitude * int(_PIXEL // _WHOLE * _SHIFT * length)


_OPERATIONS = (
    lambda image, magnitude: image,
    _stretch,
    _toward(jnp.zeros_like),
    _toward(_gray),
    _toward(_mean_gray),
    _toward(_smooth),
    _posterize,
    _solarize,
    _warp(_rotation),
    _warp(lambda height, width, magnitude: (_PIXEL, _shear(magnitude), 0, 0, _PIXEL, 0)),
    _warp(lambda height, width, magnitude: (_PIXEL, 0, 0, _shear(magnitude), _PIXEL, 0)),
    _warp(lambda height, width, magnitude: (_PIXEL, 0, _shift(magnitude, width), 0, _PIXEL, 0)),
    _warp(lambda height, width, magnitude: (_PIXEL, 0, 0, 0, _PIXEL, _shift(magnitude, height))),
)
