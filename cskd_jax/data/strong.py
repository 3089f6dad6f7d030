"""Strong augmentation on the device: two operations drawn at random, as in RandAugment, and a cut-out square."""

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.data.photographs import GRAY, blend, gray, in_rectangle, mean_gray
from cskd_jax.data.warp import PIXEL, WHOLE, make_rotation, make_warp

_DEGREES, _SHEAR, _SHIFT = 30, 0.3, 0.3


def strong_augment(images: jax.Array, key: jax.Array, positions: jax.Array) -> jax.Array:
    """Distorts the colors and the geometry of the images, and cuts a square out of each.

    Two operations are applied to each image, each drawn from: none; contrast stretched to the full range; brightness,
    color, contrast, or sharpness lowered to between 5% and 95%; colors rounded to 4 to 7 bits; colors above a threshold
    inverted; a rotation by up to 30 degrees; a shear by up to 0.3, or a shift by up to 0.3 of the side, along either
    axis, which leaves black behind. Then a square of up to half of the width becomes gray. These are the operations and
    ranges of FixMatch's RandAugment, which multi-level logit distillation uses, except for histogram equalization.

    The draw for an image depends only on `key` and its position in the global batch. The computation uses integers and
    therefore gives the same result on every device, no matter how the batch is split.

    Args:
      images: Images, uint8 [B, H, W, C].
      key: Key of the draws, different from the keys of other draws for the same positions.
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
            magnitude = jax.random.randint(magnitude_key, (), 0, WHOLE + 1)
            image = lax.switch(kind, _OPERATIONS, image, magnitude)
        return _cut_out(image, keys[2]).astype(jnp.uint8)

    return jax.vmap(one)(images, positions)


def _cut_out(image, key):
    height, width = image.shape[:2]
    size_key, row_key, column_key = jax.random.split(key, 3)
    side = jax.random.randint(size_key, (), 0, width // 2 + 1)

    def place(key, length):
        return jax.random.randint(key, (), 0, length) - side // 2, side

    inside = in_rectangle((height, width), place(row_key, height), place(column_key, width))
    return jnp.where(inside[:, :, None], GRAY, image)


def _smooth(image):
    """Returns weighted means over 3x3 pixels, the middle one with weight 5."""
    height, width = image.shape[:2]
    padded = jnp.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    total = sum(padded[row : row + height, column : column + width] for row in range(3) for column in range(3))
    return (total + 4 * image + 6) // 13


def _toward(other):
    """Returns the operation that keeps between 5% and 95% of an image, the rest of which is `other(image)`."""

    def toward(image, magnitude):
        return blend(image, other(image), 13 + magnitude * 230 // WHOLE)

    return toward


def _stretch(image, magnitude):
    del magnitude
    low, high = jnp.min(image, axis=(0, 1)), jnp.max(image, axis=(0, 1))
    return jnp.where(high > low, (image - low) * 255 // jnp.maximum(high - low, 1), image)


def _posterize(image, magnitude):
    step = jnp.left_shift(1, 4 - jnp.minimum(magnitude * 4 // WHOLE, 3))  # 16, 8, 4 or 2
    return image // step * step


def _solarize(image, magnitude):
    return jnp.where(image < magnitude, image, 255 - image)


def _shear(magnitude):
    return magnitude * int(PIXEL * _SHEAR) // WHOLE


def _shift(magnitude, length):
    return magnitude * int(PIXEL // WHOLE * _SHIFT * length)


_OPERATIONS = (
    lambda image, magnitude: image,
    _stretch,
    _toward(jnp.zeros_like),
    _toward(gray),
    _toward(mean_gray),
    _toward(_smooth),
    _posterize,
    _solarize,
    make_rotation(_DEGREES, 2 * _DEGREES + 1),
    make_warp(lambda height, width, magnitude: (PIXEL, _shear(magnitude), 0, 0, PIXEL, 0)),
    make_warp(lambda height, width, magnitude: (PIXEL, 0, 0, _shear(magnitude), PIXEL, 0)),
    make_warp(lambda height, width, magnitude: (PIXEL, 0, _shift(magnitude, width), 0, PIXEL, 0)),
    make_warp(lambda height, width, magnitude: (PIXEL, 0, 0, 0, PIXEL, _shift(magnitude, height))),
)
