"""Convolution whose kernel gradient XLA computes quickly on CPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Positions of the output whose products are added at a time. Their inputs stay in a core's cache.
_POSITIONS = 1024
_Padding = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x: jax.Array, kernel: jax.Array, stride: int, padding: int | tuple[int, int], groups: int = 1
) -> jax.Array:
    """Convolves NHWC `x` with an HWIO `kernel`; a 1x1 kernel becomes a matrix product, which is faster.

    Args:
      x: Input, [B, H, W, C].
      kernel: Kernel, [height, width, C / groups, features].
      stride: Stride along both axes.
      padding: Padding of both sides, either one number or (rows, columns).
      groups: Number of groups into which the channels are split.

    Returns:
      An array [B, H', W', features].
    """
    rows, columns = (padding, padding) if isinstance(padding, int) else padding
    if kernel.shape[:2] == (1, 1) and rows == columns == 0 and groups == 1:
        return x[:, ::stride, ::stride, :] @ kernel[0, 0]
    pads = ((rows, rows), (columns, columns))
    if groups > 1:
        return _by_xla(x, kernel, stride, pads, groups)
    return _convolve(x, kernel, stride, pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, stride: int, pads: _Padding) -> jax.Array:
    return _by_xla(x, kernel, stride, pads)


def _by_xla(x, kernel, stride, pads, groups=1):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), pads, dimension_numbers=layout, feature_group_count=groups
    )


def _forward(x, kernel, stride, pads):
    return _by_xla(x, kernel, stride, pads), (x, kernel)


def _backward(stride, pads, residuals, gradient):
    x, kernel = residuals
    (of_x,) = jax.linear_transpose(lambda x: _by_xla(x, kernel, stride, pads), x)(gradient)

    def by_xla(x, gradient):
        (found,) = jax.linear_transpose(lambda kernel: _by_xla(x, kernel, stride, pads), kernel)(gradient)
        return found

    by_products = functools.partial(_kernel_gradient, size=kernel.shape[:2], stride=stride, pads=pads)
    return of_x, lax.platform_dependent(x, gradient, cpu=by_products, default=by_xla)


_convolve.defvjp(_forward, _backward)


def _kernel_gradient(x, gradient, *, size, stride, pads):
    """Returns the gradient of a kernel as one matrix product for each of its positions, a few images at a time.

    XLA's CPU back end computes it as a convolution whose kernel is as large as the image, which takes up to ten times
    as long. The sum is the same up to the order of its terms.

    Args:
      x: Input of the convolution, [B, H, W, C].
      gradient: Gradient of its output, [B, H', W', features].
      size: Height and width of the kernel.
      stride: Stride along both axes.
      pads: Padding of the rows and of the columns.

    Returns:
      An array [*size, C, features].
    """
    batch, height, width, features = gradient.shape
    channels, dtype = x.shape[-1], np.promote_types(x.dtype, np.float32)
    most = max(1, _POSITIONS // (height * width))
    images = next(number for number in range(min(most, batch), 0, -1) if batch % number == 0)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    x = x.reshape(-1, images, *x.shape[1:])
    gradient = gradient.reshape(-1, images * height * width, features)
    offsets = [(row, column) for row in range(size[0]) for column in range(size[1])]

    def add(sums, part):
        x, gradient = part

        def product(row, column):
            stop = images, row + stride * (height - 1) + 1, column + stride * (width - 1) + 1, channels
            window = lax.slice(x, (0, row, column, 0), stop, (1, stride, stride, 1)).reshape(-1, channels)
            return lax.dot_general(window, gradient, (((0,), (0,)), ((), ())), preferred_element_type=dtype)

        return [total + product(*offset) for total, offset in zip(sums, offsets, strict=True)], None

    sums, _ = lax.scan(add, [jnp.zeros((channels, features), dtype)] * len(offsets), (x, gradient))
    return jnp.stack(sums).reshape(*size, channels, features).astype(x.dtype)
