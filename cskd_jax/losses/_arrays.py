"""Array functions that the losses share: roots and norms with a gradient at 0, schedules, and resizing of maps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Vectors shorter than the square root of this count as zero: the derivative of 1 / norm would overflow float32.
_SMALLEST_SQUARED_NORM = 1e-24


def safe_sqrt(x: jax.Array, negligible: jax.Array | float = 0.0) -> jax.Array:
    """Returns sqrt(x), but 0 with derivative 0 where x is at most `negligible` (at 0 the derivative is infinite)."""
    small = x <= negligible  # False for NaN, which stays NaN.
    return jnp.where(small, 0, jnp.sqrt(jnp.where(small, 1, x)))


def rounding_of_difference(squared_norms: jax.Array) -> jax.Array:
    """Returns the squared norm up to which a difference of two arrays counts as rounding.

    The gradient of a norm has length 1 no matter how short its argument is. Where two arrays differ only in the order
    in which XLA added up their sums, that gradient is full-size noise.

    Args:
      squared_norms: Sum of the squared norms of the two arrays.

    Returns:
      An array of the same shape: the square of 8 eps times the norms, where eps is the machine epsilon of the dtype. It
      is not differentiated.
    """
    # Measured: cosines of 128 centers of 16,384 numbers differ by up to 2 eps of their norm from the float64 values.
    bound = 8 * float(jnp.finfo(squared_norms.dtype).eps)
    return bound**2 * lax.stop_gradient(squared_norms)


def rounding_of_mean(squares: jax.Array) -> jax.Array:
    """Returns the sum of squared deviations from a mean up to which values count as equal.

    The mean of equal values is rounded, so they deviate from it.

    Args:
      squares: Sum of the squares of the values; a mean of squares bounds a mean of squared deviations.

    Returns:
      An array of the same shape, which is not differentiated.
    """
    return jnp.maximum(rounding_of_difference(squares), _SMALLEST_SQUARED_NORM)


def safe_rsqrt(x: jax.Array, negligible: jax.Array | float = _SMALLEST_SQUARED_NORM) -> jax.Array:
    """Returns 1 / sqrt(x), but 0 with derivative 0 where x is at most `negligible`."""
    small = x <= negligible  # False for NaN, which stays NaN.
    return jnp.where(small, 0, lax.rsqrt(jnp.where(small, 1, x)))


def normalize(x: jax.Array) -> jax.Array:
    """Divides vectors along the last axis by their Euclidean norm; a zero vector stays zero, with zero gradient."""
    return x * safe_rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))


def half_cosine(progress: jax.Array, length: int) -> jax.Array:
    """Returns a factor that falls along half a cosine from 1 where `progress` is at most 0 to 0 from `length` on."""
    share = jnp.clip(progress, 0, length).astype(float) / length
    return 0.5 * (1 + jnp.cos(math.pi * share))


def cells(length: int, number: int) -> list[slice]:
    """Returns the positions of each of `number` equal cells along an axis of length `length`.

    Where the number does not divide the length, cell i of n covers the positions from floor(i H / n) to ceil((i + 1) H
    / n). Such cells overlap, as in torch's adaptive average pooling.
    """
    return [slice(cell * length // number, -(-(cell + 1) * length // number)) for cell in range(number)]


def mean_over_positions(x: jax.Array) -> jax.Array:
    """Averages maps [B, H, W, D] or tokens [B, T, D] over their positions to [B, D]; vectors [B, D] stay unchanged."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))


def average_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Averages maps over `cells` of both axes: [B, H, W, D] -> [B, *size, D]; a larger `size` repeats values."""
    return _pool_axis(_pool_axis(x, 1, size[0]), 2, size[1])


def _pool_axis(x, axis, size):
    length = x.shape[axis]
    if length == size:
        return x
    if length % size == 0:
        return x.reshape(*x.shape[:axis], size, length // size, *x.shape[axis + 1 :]).mean(axis + 1)
    weights = np.zeros((length, size))
    for cell, positions in enumerate(cells(length, size)):
        weights[positions, cell] = 1 / (positions.stop - positions.start)
    pooled = jnp.tensordot(x, jnp.asarray(weights, x.dtype), (axis, 0), precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(pooled, -1, axis)


def pool_to_common_size(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns both maps [B, H, W, D], the larger average-pooled to the height and width of the smaller."""
    size = min(x.shape[1], y.shape[1]), min(x.shape[2], y.shape[2])
    return average_pool(x, size), average_pool(y, size)


def resize(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes [B, H, W, D] to [B, *size, D]: averages where `size` is smaller, repeats neighbors where it is larger."""
    x = average_pool(x, (min(x.shape[1], size[0]), min(x.shape[2], size[1])))
    for axis in (1, 2):
        length, wanted = x.shape[axis], size[axis - 1]
        if length != wanted:
            x = jnp.take(x, np.arange(wanted) * length // wanted, axis=axis)
    return x
