"""Layers that methods train beside the student, to bring its maps to the teacher's channels.

They are used in training only: they normalize by the statistics of the batch and keep no running averages.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the distribution from which torch.nn.Linear and torch.nn.Conv2d draw weights.
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Pointwise(nn.Module):
    """A linear map of the last axis (a 1x1 convolution where the input is a map), in at least float32.

    Attributes:
      features: Number of output channels.
      use_bias: Whether to add a bias, which starts at 0.
    """

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., D] to [..., features]."""
        dtype = np.promote_types(x.dtype, np.float32)
        kernel = self.param("kernel", torch_uniform, (x.shape[-1], self.features), dtype)
        x = x.astype(dtype) @ kernel
        if self.use_bias:
            x += self.param("bias", nn.initializers.zeros, (self.features,), dtype)
        return x


class Convolution(nn.Module):
    """A convolution with stride 1 and without bias that keeps the size of the map, in at least float32.

    Attributes:
      features: Number of output channels.
      kernel_size: Side of the square kernel, an odd number.
      kernel_init: Initializer of the kernel.
    """

    features: int
    kernel_size: int
    kernel_init: Callable = torch_uniform

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, D] to [B, H, W, features]."""
        dtype = np.promote_types(x.dtype, np.float32)
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, dtype)
        x = x.astype(dtype)
        if self.kernel_size == 1:
            return x @ kernel[0, 0]
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Connector(nn.Module):
    """A `Convolution`, followed by batch normalization by the statistics of the global batch.

    Attributes:
      features: Number of output channels.
      kernel_size: Side of the square kernel.
      axis_name: Name of the mapped axis over which the batch is split, or None.
      kernel_init: Initializer of the kernel.
      epsilon: Number added to the variance.
    """

    features: int
    kernel_size: int = 1
    axis_name: str | None = None
    kernel_init: Callable = torch_uniform
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, D] to [B, H, W, features]."""
        x = Convolution(self.features, self.kernel_size, self.kernel_init, name="convolution")(x)
        scale = self.param("scale", nn.initializers.ones, (self.features,), x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), x.dtype)
        mean = self._global(jnp.mean(x, axis=(0, 1, 2)))
        variance = self._global(jnp.mean(jnp.square(x - mean), axis=(0, 1, 2)))
        return (x - mean) * (scale * lax.rsqrt(variance + self.epsilon)) + bias

    def _global(self, mean):
        return mean if self.axis_name is None else lax.pmean(mean, self.axis_name)
