"""The global batch, for what relates, sums or counts its samples when it is split over devices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def gather_batch(x: jax.Array, axis_name: str | None) -> jax.Array:
    """The rows of all devices in the order of the global batch; `x` itself where `axis_name` is None.

    A loss of the gathered rows has the same value on every device. Each device then holds the gradient of the global
    loss with respect to its own rows times the number of devices, so that the mean over devices of the gradients of
    shared parameters is the gradient of the global loss.

    Args:
      x: [B, ...], the rows of this device.
      axis_name: mapped axis over which the batch is split, or None on one device.

    Returns:
      [B * devices, ...].
    """
    return x if axis_name is None else lax.all_gather(x, axis_name, tiled=True)


def sum_batch(x: Any, axis_name: str | None) -> Any:
    """Sums of the global batch from those of this device, a tree of arrays; `x` itself where `axis_name` is None."""
    return x if axis_name is None else lax.psum(x, axis_name)


def batch_positions(batch_size: int, axis_name: str | None) -> jax.Array:
    """int32 [B]: the positions in the global batch of the `batch_size` samples of this device."""
    offset = 0 if axis_name is None else lax.axis_index(axis_name) * batch_size
    return offset + jnp.arange(batch_size, dtype=jnp.int32)
