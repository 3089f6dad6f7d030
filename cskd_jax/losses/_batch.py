"""The global batch, for losses that relate, sum or count samples that are split over devices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def gather_batch(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the rows of all devices in the order of the global batch; `x` itself where `axis_name` is None.

    A loss of the gathered rows has the same value on every device. Each device then holds the gradient of the global
    loss with respect to its own rows times the number of devices, so that the mean over devices of the gradients of
    shared parameters is the gradient of the global loss.

    Args:
      x: Rows of this device, [B, ...].
      axis_name: Name of the mapped axis over which the batch is split, or None on one device.

    Returns:
      An array [B * devices, ...].
    """
    return x if axis_name is None else lax.all_gather(x, axis_name, tiled=True)


def sum_batch(x: Any, axis_name: str | None) -> Any:
    """Returns the sums over all devices of a tree of arrays; `x` itself where `axis_name` is None."""
    return x if axis_name is None else lax.psum(x, axis_name)


def batch_positions(batch_size: int, axis_name: str | None) -> jax.Array:
    """Returns the positions in the global batch of the `batch_size` samples of this device, int32 [B]."""
    offset = 0 if axis_name is None else lax.axis_index(axis_name) * batch_size
    return offset + jnp.arange(batch_size, dtype=jnp.int32)
