"""Image preprocessing on the device, inside the step: resizing, random crop, flip, normalization."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cskd_jax.data import photographs
from cskd_jax.data.warp import WHOLE, make_rotation
from cskd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Normalize:
    """A function from uint8 [B, H, W, C] to (x / 255 - mean) / std, float32.

    Attributes:
      mean: Mean of the pixels in [0, 1], one number per channel or one for all.
      std: Standard deviation of the pixels in [0, 1], one number per channel or one for all.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def checked(self, channels: int, name: str = "") -> "Normalize":
        """Returns this normalization after checking it.

        Args:
          channels: Number of channels of the images.
          name: Prefix of `mean` and `std` in the message, such as "dataset.".

        Raises:
          UserError: If mean or deviation is neither one number nor one per channel, or if the deviation cannot be
            divided by.
        """
        for kind, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise UserError(
                    f"{name}{kind} has {len(values)} values, but the images have {channels} channels: it must have one "
                    "value for all channels, or one per channel"
                )
            numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
            if not numbers or (kind == "std" and min(values) <= 0):
                raise UserError(
                    f"{name}{kind} is {values}; its values must be finite numbers{' above 0' * (kind == 'std')}"
                )
        return self

    def is_same(self, other: "Normalize") -> bool:
        """Returns whether another normalization gives the same results."""
        channels = max(map(len, (self.mean, self.std, other.mean, other.std)))

        def per_channel(values):
            return tuple(values) * (channels if len(values) == 1 else 1)

        pairs = ((self.mean, other.mean), (self.std, other.std))
        return all(per_channel(ours) == per_channel(theirs) for ours, theirs in pairs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the normalized images."""
        mean, std = (np.asarray(values, np.float64) for values in (self.mean, self.std))
        scale, shift = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
        return images.astype(jnp.float32) * scale + shift


# Numbers folded into an image's key for further draws, and the number of angles from which a rotation is drawn.
_ROTATION, _AREA, _COLOR, _ERASING = 1, 2, 3, 4
_ANGLES = WHOLE + 1


def augment(
    images: jax.Array,
    key: jax.Array,
    positions: jax.Array,
    *,
    resize: int = 0,
    rotation: int = 0,
    crop_area: float = 1.0,
    crop_padding: int,
    flip: bool,
    color_jitter: float = 0.0,
    erasing: float = 0.0,
) -> jax.Array:
    """Enlarges, rotates, crops randomly back to the original size, mirrors, changes colors, and erases, in this order.

    The draw for an image depends only on `key` and its position in the global batch, not on how the batch is split.

    Args:
      images: Images, uint8 [B, H, W, C].
      key: Key of the step.
      positions: Positions of the images in the global batch, int32 [B].
      resize: Pixels of the shorter side after enlarging; 0 leaves the images unchanged.
      rotation: Largest rotation of an image around its center, in degrees, in either direction; corners from outside
        the image are black.
      crop_area: Smallest share of the area in `photographs.resized_crop`; 1 disables it.
      crop_padding: Pixels of zeros on each side, added after enlarging; 0 adds none.
      flip: Whether to mirror horizontally with probability 1/2.
      color_jitter: Strength of `photographs.color_jitter`.
      erasing: Probability of `photographs.erase`.

    Returns:
      Images, uint8 [B, H, W, C].

    Raises:
      ValueError: If `resize` would make the images smaller, or if they are too large; see `enlarge` and `photographs`.
    """
    shape = images.shape[1:]
    if resize:
        images = enlarge(images, resize)
    pad = (crop_padding, crop_padding)
    margin = np.array(images.shape[1:3], np.int32) + np.int32(2 * crop_padding) - np.array(shape[:2], np.int32)
    rotate = make_rotation(rotation, _ANGLES)

    def one(image, position):
        own_key = jax.random.fold_in(key, position)
        crop_key, flip_key = jax.random.split(own_key)
        if rotation:
            magnitude = jax.random.randint(jax.random.fold_in(own_key, _ROTATION), (), 0, WHOLE + 1)
            image = rotate(image, magnitude)
        if crop_area < 1:
            image = photographs.resized_crop(image, jax.random.fold_in(own_key, _AREA), crop_area)
        if margin.any():
            offset = jax.random.randint(crop_key, (2,), 0, margin + 1)
            image = lax.dynamic_slice(jnp.pad(image, (pad, pad, (0, 0))), (*offset, 0), shape)
        if flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        if color_jitter:
            image = photographs.color_jitter(image, jax.random.fold_in(own_key, _COLOR), color_jitter)
        if erasing:
            image = photographs.erase(image, jax.random.fold_in(own_key, _ERASING), erasing)
        return image

    return jax.vmap(one)(images, positions)


def enlarged_size(height: int, width: int, shorter_side: int) -> tuple[int, int]:
    """Returns the height and width of an image whose shorter side gets this many pixels."""
    new_height, new_width = (round(side * shorter_side / min(height, width)) for side in (height, width))
    return new_height, new_width


def enlarge(images: jax.Array, shorter_side: int) -> jax.Array:
    """Enlarges images bilinearly, rounding to the nearest value.

    The computation is in integers and therefore exact: it is the same on every device, no matter how the batch is
    split.

    Args:
      images: Images, uint8 [B, H, W, C].
      shorter_side: Pixels of the shorter side of the result, at least as many as in the images.

    Returns:
      Images uint8 [B, H', W', C] with the same proportions.

    Raises:
      ValueError: If the result would be smaller than the images, or have more than `photographs.MOST_INTERPOLATED`
        pixels.
    """
    height, width = images.shape[1:3]
    if shorter_side < min(height, width):
        raise ValueError(f"resize is {shorter_side}; images of {width}x{height} pixels can only be enlarged")
    new_height, new_width = enlarged_size(height, width, shorter_side)
    photographs.check_size(new_height, new_width, photographs.MOST_INTERPOLATED)
    rows = photographs.interpolate(images.astype(jnp.int32), 1, new_height)
    total = 4 * new_height * new_width  # The sum of the weights.
    return ((photographs.interpolate(rows, 2, new_width) + total // 2) // total).astype(jnp.uint8)
