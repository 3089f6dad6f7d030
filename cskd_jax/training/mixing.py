"""Pairwise mixing of the images of a batch: mixup and CutMix."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.data.photographs import in_rectangle
from cskd_jax.errors import UserError
from cskd_jax.losses import gather_batch

# Folded into the key of a step to get a key for each random draw of mixing.
_PROBABILITY, _SHARE, _BOX = range(3)


@dataclasses.dataclass(frozen=True)
class Mix:
    """A function that mixes every image of a batch with another: by mixup, by CutMix, or by either of them.

    The first image of the global batch is mixed with the last, the second with the second to last, and so on. A single
    share is used for the whole batch and is drawn from a beta distribution with both parameters equal. mixup adds the
    images with weights share and 1 - share (Zhang et al. 2018, https://arxiv.org/abs/1710.09412); CutMix replaces a
    rectangle with about 1 - share of the area by the same part of the other image (Yun et al. 2019,
    https://arxiv.org/abs/1905.04899), and the share becomes the fraction of the image that is left. With both, one of
    them is drawn for each batch with equal probability, as in timm. Teacher and student both see the mixed images.

    Attributes:
      mixup: Parameter of the beta distribution for mixup; 0 leaves it out.
      cutmix: Parameter of the beta distribution for CutMix; 0 leaves it out.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self):
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 100:
                raise UserError(f"{name} is {value!r}; it must be a number from 0 to 100")

    def __bool__(self) -> bool:
        """Returns whether any image is mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def __call__(self, images: jax.Array, key: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
        """Mixes the images of a batch.

        Args:
          images: Inputs of the networks on this device, float [B, H, W, C].
          key: Key of the step, the same on all devices.
          axis_name: Mapped axis over which the batch is split; None on one device.

        Returns:
          The mixed images, and the share of its original image that each retains, float32 [B].

        Raises:
          ValueError: The images are not floating point.
        """
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"mixup and cutmix need floating-point network inputs; got {images.dtype}")
        others = partners(images, axis_name)
        uses_mixup = jnp.bool_(self.mixup > 0)
        if self.mixup and self.cutmix:
            uses_mixup = jax.random.bernoulli(jax.random.fold_in(key, _PROBABILITY))
        parameter = jnp.where(uses_mixup, jnp.float32(self.mixup), jnp.float32(self.cutmix))
        share = jax.random.beta(jax.random.fold_in(key, _SHARE), parameter, parameter, dtype=jnp.float32)
        in_box = _draw_box(jax.random.fold_in(key, _BOX), share, images.shape[1:3])
        own = jnp.where(uses_mixup, share, 1 - in_box.astype(jnp.float32))
        weights = own.astype(images.dtype)[:, :, None]
        return weights * images + (1 - weights) * others, jnp.full(len(images), jnp.mean(own))


def partners(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the row that each row [B, ...] of this device is mixed with, from the other end of the global batch."""
    backwards = gather_batch(x, axis_name)[::-1]
    if axis_name is None:
        return backwards
    return lax.dynamic_slice_in_dim(backwards, lax.axis_index(axis_name) * len(x), len(x))


def _draw_box(key, share, size):
    """Returns a mask [H, W] of the pixels in a random rectangle with 1 - share of the area, clipped at the borders."""

    def place(key, length):
        middle = jax.random.randint(key, (), 0, length)
        half = (length * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
        return middle - half, 2 * half

    row_key, column_key = jax.random.split(key)
    return in_rectangle(size, place(row_key, size[0]), place(column_key, size[1]))
