"""Image preprocessing on the device, inside the step: random shift, flip, normalization."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def make_normalize(mean: Sequence[float], std: Sequence[float]) -> Callable[[jax.Array], jax.Array]:
    """Returns a function from uint8 [B, H, W, C] to (x / 255 - mean) / std, float32, with per-channel mean and std."""
    scale = (1 / (255 * np.asarray(std, np.float64))).astype(np.float32)
    shift = (-np.asarray(mean, np.float64) / np.asarray(std, np.float64)).astype(np.float32)
    return lambda images: images.astype(jnp.float32) * scale + shift


def augment(images: jax.Array, key: jax.Array, positions: jax.Array, *, crop_padding: int, flip: bool) -> jax.Array:
    """Pads with zeros (black), crops at random back to the size, and mirrors half of the images.

    The draw of an image depends on `key` and its position in the global batch alone, not on how the batch is split.

    Args:
      images: uint8 [B, H, W, C].
      key: of the step.
      positions: int32 [B], positions in the global batch.
      crop_padding: pixels of zeros on each side; 0 for no crop.
      flip: whether to mirror horizontally with probability 1/2.

    Returns:
      uint8 [B, H, W, C].
    """

    def one(image, position):
        crop_key, flip_key = jax.random.split(jax.random.fold_in(key, position))
        if crop_padding:
            pad = (crop_padding, crop_padding)
            offset = jax.random.randint(crop_key, (2,), 0, 2 * crop_padding + 1)
            image = lax.dynamic_slice(jnp.pad(image, (pad, pad, (0, 0))), (*offset, 0), image.shape)
        if flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        return image

    return jax.vmap(one)(images, positions)
