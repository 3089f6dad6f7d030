"""Layers shared by the networks: convolution with batch normalization as PyTorch computes it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

# torch.nn.init.kaiming_normal_(mode="fan_out", nonlinearity="relu")
kaiming_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def torch_uniform(fan_in: int) -> Callable:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): what torch.nn.Linear and torch.nn.Conv2d draw weight and bias from."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    """2-D convolution of NHWC `x` with an HWIO `kernel`; a 1x1 kernel becomes a matrix product, which is faster."""
    if kernel.shape[:2] == (1, 1) and padding == 0:
        return x[:, ::stride, ::stride, :] @ kernel[0, 0]
    pads = ((padding, padding), (padding, padding))
    return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class ConvBatchNorm(nn.Module):
    """Convolution without bias followed by batch normalization.

    One module, so that evaluation mode can fold the normalization into the kernel: one pass over the activations less.
    The statistics are those of the global batch when `axis_name` is given. Matches torch.nn.BatchNorm2d: biased
    variance to normalize, unbiased variance in the running average. Parameters and statistics are float32 (float64 if
    `dtype` is), statistics are computed in that precision whatever `dtype` is.

    Attributes:
      features: output channels.
      kernel_size: side of the square kernel.
      stride: of the convolution.
      dtype: of the computation.
      axis_name: mapped axis over which the batch is split, or None.
      momentum: of the running averages, new = momentum * old + (1 - momentum) * batch (torch's is 1 - momentum).
      epsilon: added to the variance.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    dtype: Any = jnp.float32
    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [B, H, W, C] -> [B, H', W', features]; padding keeps H and W at stride 1."""
        stats_dtype = np.promote_types(self.dtype, np.float32)
        size = self.kernel_size
        kernel = self.param("kernel", kaiming_normal_fan_out, (size, size, x.shape[-1], self.features), stats_dtype)
        scale = self.param("scale", nn.initializers.ones, (self.features,), stats_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), stats_dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, (self.features,), stats_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, (self.features,), stats_dtype)

        x = x.astype(self.dtype)
        if not train:
            gain = scale * lax.rsqrt(var.value + self.epsilon)
            x = convolve(x, (kernel * gain).astype(self.dtype), self.stride, size // 2)
            return x + (bias - mean.value * gain).astype(self.dtype)

        x = convolve(x, kernel.astype(self.dtype), self.stride, size // 2)
        batch_mean, batch_var, count = self._batch_statistics(x.astype(stats_dtype))
        if not self.is_initializing():
            unbiased = batch_var * (count / max(count - 1, 1))
            mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
            var.value = self.momentum * var.value + (1 - self.momentum) * unbiased
        gain = scale * lax.rsqrt(batch_var + self.epsilon)
        return (x.astype(stats_dtype) * gain + (bias - batch_mean * gain)).astype(self.dtype)

    def _batch_statistics(self, x):
        """Mean and biased variance per channel over the global batch, and the number of values they are over."""
        count = x.size // x.shape[-1]
        mean = jnp.mean(x, axis=(0, 1, 2))
        if self.axis_name is not None:
            count *= lax.axis_size(self.axis_name)
            mean = lax.pmean(mean, self.axis_name)
        # Around the mean, not E[x^2] - E[x]^2: that one loses its digits where the mean is large.
        var = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2))
        if self.axis_name is not None:
            var = lax.pmean(var, self.axis_name)
        return mean, var, count


class Classifier(nn.Module):
    """Linear layer with PyTorch's initialization; logits are computed and returned in at least float32."""

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = np.promote_types(self.dtype, np.float32)
        init = torch_uniform(x.shape[-1])
        kernel = self.param("kernel", init, (x.shape[-1], self.num_classes), dtype)
        bias = self.param("bias", init, (self.num_classes,), dtype)
        return x.astype(dtype) @ kernel + bias
