"""The global batch, for losses that relate, sum or count samples that are split over devices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._arrays import rounding_of_mean, safe_rsqrt


def gather_batch(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the rows of all devices in the order of the global batch; `x` itself where `axis_name` is None.

    A loss computed from the gathered rows has the same value on every device. Each device then holds the gradient of
    the global loss with respect to its own rows times the number of devices, so that the mean over devices of the
    gradients of shared parameters is the gradient of the global loss.

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


def mean_batch(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Returns the mean [D] over the rows, or positions, of the global batch; `x` [B, ..., D] is this device's part."""
    mean = jnp.mean(x, axis=tuple(range(x.ndim - 1)))
    return mean if axis_name is None else lax.pmean(mean, axis_name)


def count_batch(x: jax.Array, axis_name: str | None) -> int:
    """Returns the number of rows of the global batch; `x` holds the rows of this device."""
    return len(x) * (1 if axis_name is None else lax.axis_size(axis_name))


def batch_statistics(x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and the biased variance [D] of the features of x [B, ..., D] over the global batch."""
    mean = mean_batch(x, axis_name)
    return mean, mean_batch(jnp.square(x - mean), axis_name)


def standardize_batch(
    x: jax.Array, axis_name: str | None, *, epsilon: float = 0.0, unbiased: bool = False
) -> jax.Array:
    """Scales each feature of the rows [B, D] to mean 0 and variance 1 over the global batch.

    Args:
      x: Rows of this device.
      axis_name: Name of the mapped axis over which the batch is split, or None on one device.
      epsilon: Number added to the variance. A feature that does not vary is 0 with zero gradient even without it.
      unbiased: Whether the sum of squares is divided by the number of rows minus one.

    Returns:
      An array of the shape of `x`.
    """
    mean, variance = batch_statistics(x, axis_name)
    # With an epsilon, no derivative is too large.
    constant = 0.0 if epsilon else rounding_of_mean(variance + jnp.square(mean))
    if unbiased:
        rows = count_batch(x, axis_name)
        variance *= rows / (rows - 1)
    return (x - mean) * safe_rsqrt(variance + epsilon, constant)


def batch_positions(batch_size: int, axis_name: str | None) -> jax.Array:
    """Returns the positions in the global batch of the `batch_size` samples of this device, int32 [B]."""
    offset = 0 if axis_name is None else lax.axis_index(axis_name) * batch_size
    return offset + jnp.arange(batch_size, dtype=jnp.int32)
