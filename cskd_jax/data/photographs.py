"""Augmentation of photographs on the device: random resized crop, color jitter, random erasing.

All pixel computations use integers and therefore give the same result on every device, no matter how the batch is
split.
"""

import jax
import jax.numpy as jnp
import numpy as np

from cskd_jax.data.warp import WHOLE

# As in torchvision: aspect ratios (width to height) of a crop, and area shares and aspect ratios of the erased
# rectangle.
_CROP_RATIOS, _ERASED_AREAS, _ERASED_RATIOS = (3 / 4, 4 / 3), (0.02, 1 / 3), (0.3, 3.3)
# Erased pixels are gray, which is about the mean of photographs.
GRAY = 124
# Pixels of the largest image whose interpolated values, and of the largest whose sum, fit into 32-bit integers.
MOST_INTERPOLATED, MOST_SUMMED = 2**21, 2**23


def resized_crop(image: jax.Array, key: jax.Array, smallest_area: float) -> jax.Array:
    """Cuts a random rectangle out of an image and enlarges it bilinearly to the size of the image.

    Args:
      image: Image, uint8 [H, W, C].
      key: Key of the draws.
      smallest_area: Smallest share of the image area that the rectangle covers; the largest is 1. Its ratio of width to
        height is between 3/4 and 4/3 of the image's, as far as the borders allow.

    Returns:
      An image, uint8 [H, W, C].

    Raises:
      ValueError: The image has more than `MOST_INTERPOLATED` pixels.

    References:
      Szegedy et al. 2015, https://arxiv.org/abs/1409.4842; torchvision's RandomResizedCrop.
    """
    height, width = image.shape[:2]
    check_size(height, width, MOST_INTERPOLATED)
    (top, rows), (left, columns) = _draw_box(key, image.shape[:2], (smallest_area, 1.0), _CROP_RATIOS)
    values = interpolate(image.astype(jnp.int32), 0, height, top, rows)
    total = 4 * height * width  # The sum of the weights.
    return ((interpolate(values, 1, width, left, columns) + total // 2) // total).astype(jnp.uint8)


def color_jitter(image: jax.Array, key: jax.Array, strength: float) -> jax.Array:
    """Changes brightness, contrast and saturation of an image, each by a factor from 1 - strength to 1 + strength.

    Args:
      image: Image, uint8 [H, W, C].
      key: Key of the draws.
      strength: Largest change, in [0, 1].

    Returns:
      An image, uint8 [H, W, C].

    Raises:
      ValueError: The image has more than `MOST_SUMMED` pixels.
    """
    image, change = image.astype(jnp.int32), round(WHOLE * strength)
    factors = jax.random.randint(key, (3,), WHOLE - change, WHOLE + change + 1)
    others = (jnp.zeros_like, mean_gray, gray)
    for factor, other in zip(factors, others, strict=True):
        image = blend(image, other(image), factor)
    return image.astype(jnp.uint8)


def erase(image: jax.Array, key: jax.Array, probability: float) -> jax.Array:
    """Fills a random rectangle that covers 2% to 33% of the area of an image with gray.

    Args:
      image: Image, uint8 [H, W, C].
      key: Key of the draws.
      probability: Probability that anything is erased.

    Returns:
      An image, uint8 [H, W, C].

    References:
      Zhong, Zheng, Kang, Li, Yang, "Random Erasing Data Augmentation", 2020, https://arxiv.org/abs/1708.04896.
    """
    happens_key, box_key = jax.random.split(key)
    size = image.shape[:2]
    inside = in_rectangle(size, *_draw_box(box_key, size, _ERASED_AREAS, _ERASED_RATIOS))
    erased = inside & jax.random.bernoulli(happens_key, probability)
    return jnp.where(erased[:, :, None], jnp.uint8(GRAY), image)


def check_size(height: int, width: int, most: int) -> None:
    """Raises ValueError if an image has more than `most` pixels."""
    if height * width > most:
        raise ValueError(
            f"images of {width}x{height} pixels are too large for 32-bit integers, at most {most:,} pixels"
        )


def in_rectangle(
    size: tuple[int, ...], rows: tuple[jax.Array, jax.Array], columns: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Returns which pixels of an image lie in a rectangle, bool [H, W].

    Args:
      size: Height and width of the image.
      rows: The first row of the rectangle, which may lie outside of the image, and the number of its rows.
      columns: The first column and the number of columns, in the same way.
    """

    def is_inside(length, first, count):
        at = jnp.arange(length, dtype=jnp.int32)
        return (at >= first) & (at < first + count)

    return is_inside(size[0], *rows)[:, None] & is_inside(size[1], *columns)


def gray(image: jax.Array) -> jax.Array:
    """Returns the brightness of the pixels [H, W, 1] of an image, int32 [H, W, C]."""
    if image.shape[-1] != 3:
        return jnp.sum(image, axis=-1, keepdims=True) // image.shape[-1]
    return jnp.sum(image * np.array([77, 150, 29], np.int32), axis=-1, keepdims=True) // WHOLE


def mean_gray(image: jax.Array) -> jax.Array:
    """Returns the mean brightness of an image, int32 [H, W, C], a scalar; it has at most `MOST_SUMMED` pixels."""
    height, width = image.shape[:2]
    check_size(height, width, MOST_SUMMED)
    return jnp.sum(gray(image)) // (height * width)


def blend(image: jax.Array, other: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns factor / WHOLE of an image, int32 [H, W, C], plus the rest, which may be negative, of another."""
    return jnp.clip((image * factor + other * (WHOLE - factor) + WHOLE // 2) // WHOLE, 0, 255)


def _draw_box(key, size, areas, ratios):
    """Returns ((first row, number of rows), (first column, number of columns)) of a random rectangle in an image."""
    area_key, ratio_key, row_key, column_key = jax.random.split(key, 4)
    area = jax.random.uniform(area_key, (), jnp.float32, *areas)
    root = jnp.exp(jax.random.uniform(ratio_key, (), jnp.float32, *(np.log(ratios) / 2)))

    def place(key, length, share):
        count = jnp.clip(jnp.round(length * share).astype(jnp.int32), 1, length)
        return jax.random.randint(key, (), 0, length - count + 1), count

    return place(row_key, size[0], jnp.sqrt(area) / root), place(column_key, size[1], jnp.sqrt(area) * root)


def interpolate(
    values: jax.Array, axis: int, new_size: int, start: int | jax.Array = 0, size: int | jax.Array | None = None
) -> jax.Array:
    """Interpolates a part of int32 values linearly along an axis.

    Args:
      values: Values, int32.
      axis: The axis.
      new_size: Number of values of the result along the axis, at least as many as in the part.
      start: Position of the first value of the part.
      size: Number of values of the part; None takes all.

    Returns:
      The interpolated values times 2 * new_size, int32.
    """
    size, scale = values.shape[axis] if size is None else size, 2 * new_size
    # Pixel i of the result has its center at (i + 1/2) * size / new_size - 1/2 in the old pixels, here times `scale`.
    middle = jnp.clip((2 * jnp.arange(new_size, dtype=jnp.int32) + 1) * size - new_size, 0, (size - 1) * scale)
    low, weight = middle // scale, middle % scale
    weight = weight.reshape([-1 if other == axis else 1 for other in range(values.ndim)])
    below = jnp.take(values, start + low, axis)
    above = jnp.take(values, start + jnp.minimum(low + 1, size - 1), axis)
    return below * (scale - weight) + above * weight
