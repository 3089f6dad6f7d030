"""Layers that the networks share, such as convolution with batch normalization as PyTorch computes it."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from cskd_jax.convolution import convolve

# This is torch.nn.init.kaiming_normal_(mode="fan_out", nonlinearity="relu").
kaiming_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def torch_uniform(fan_in: int) -> Callable:
    """Returns the initializer U(-1/sqrt(fan_in), 1/sqrt(fan_in)) of torch.nn.Linear and torch.nn.Conv2d."""
    bound = fan_in**-0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def torch_kernel(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Returns an initial kernel, [..., features], drawn as torch.nn.Linear and torch.nn.Conv2d do."""
    return torch_uniform(math.prod(shape[:-1]))(key, shape, dtype)


def scale_width(channels: int, width: float, multiple: int = 1) -> int:
    """Returns `channels` times the factor `width`, rounded to a multiple of `multiple`."""
    scaled = round(channels * width / multiple) * multiple
    if scaled < 1:
        raise ValueError(f"width {width} leaves a stage without channels")
    return scaled


def max_pool(x: jax.Array, stride: int) -> jax.Array:
    """Applies a 3x3 max-pool to [B, H, W, C]; each side becomes ceil(side / stride)."""
    # flax annotates padding as a string only, but documents pairs of numbers.
    padding: Any = ((1, 1), (1, 1))
    return nn.max_pool(x, (3, 3), strides=(stride, stride), padding=padding)


def average_pool(x: jax.Array, stride: int) -> jax.Array:
    """Applies a 3x3 average-pool to [B, H, W, C]; the padding counts as zeros, as in torch.nn.AvgPool2d."""
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    total = lax.reduce_window(x, np.zeros((), x.dtype), lax.add, (1, 3, 3, 1), (1, stride, stride, 1), pads)
    return total / 9


def mean_of_cells(x: jax.Array, cells: int) -> jax.Array:
    """Returns the means of `cells` x `cells` equal parts of maps [B, H, W, C], as [B, C * cells * cells].

    The means of a channel are adjacent, as after torch.nn.AvgPool2d and flattening [B, C, H, W].

    Raises:
      ValueError: If a side of the maps is not divisible by `cells`.
    """
    batch, height, width, channels = x.shape
    if height % cells or width % cells:
        raise ValueError(f"maps of {height}x{width} cannot be divided into {cells}x{cells} cells; use larger images")
    parts = x.reshape(batch, cells, height // cells, cells, width // cells, channels)
    return jnp.mean(parts, axis=(2, 4)).transpose(0, 3, 1, 2).reshape(batch, -1)


class Convolution(nn.Module):
    """A convolution without bias; the kernel is at least float32.

    Attributes:
      features: Number of output channels.
      kernel_size: Side of the square kernel.
      stride: Stride of the convolution.
      dtype: Dtype of the computation.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, C] to [B, H', W', features]; padding keeps H and W at stride 1."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", kaiming_normal_fan_out, shape, np.promote_types(self.dtype, np.float32))
        return convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.kernel_size // 2)


class BatchNorm(nn.Module, kw_only=True):
    """Batch normalization that matches torch.nn.BatchNorm2d.

    The statistics are those of the global batch when `axis_name` is given. As in PyTorch, the biased variance is used
    to normalize and the unbiased variance to update the running average. Parameters and statistics are float32 (float64
    if `dtype` is), and statistics are computed in that precision regardless of `dtype`.

    Attributes:
      dtype: Dtype of the computation.
      axis_name: Name of the mapped axis over which the batch is split, or None.
      momentum: Momentum of the running averages, new = momentum * old + (1 - momentum) * batch (torch's is 1 -
        momentum).
      epsilon: Number added to the variance.
    """

    dtype: Any = jnp.float32
    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalizes x [B, H, W, C]."""
        x, norm = x.astype(self.dtype), self._variables(x.shape[-1])
        if train:
            return self._by_batch(x, norm)
        gain, shift = self._by_averages(norm)
        return x * gain.astype(self.dtype) + shift.astype(self.dtype)

    def _variables(self, features):
        dtype = np.promote_types(self.dtype, np.float32)
        return _NormVariables(
            self.param("scale", nn.initializers.ones, (features,), dtype),
            self.param("bias", nn.initializers.zeros, (features,), dtype),
            self.variable("batch_stats", "mean", jnp.zeros, (features,), dtype),
            self.variable("batch_stats", "var", jnp.ones, (features,), dtype),
        )

    def _by_averages(self, norm):
        """Returns (gain, shift) that normalize by the running averages."""
        gain = norm.scale * lax.rsqrt(norm.var.value + self.epsilon)
        return gain, norm.bias - norm.mean.value * gain

    def _by_batch(self, x, norm):
        """Normalizes x by the statistics of the batch, and updates the running averages with them."""
        y, mean, unbiased = normalize_by_batch(
            x.astype(norm.scale.dtype), norm.scale, norm.bias, epsilon=self.epsilon, axis_name=self.axis_name
        )
        if not self.is_initializing():
            norm.mean.value = self.momentum * norm.mean.value + (1 - self.momentum) * mean
            norm.var.value = self.momentum * norm.var.value + (1 - self.momentum) * unbiased
        return y.astype(self.dtype)


# Jitted so that a network traces and lowers it once for all layers of the same shape, not once for each layer.
@partial(jax.jit, static_argnames=("epsilon", "axis_name"))
def normalize_by_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, axis_name: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalizes x [B, H, W, C] over the global batch; returns (normalized x, mean [C], unbiased variance [C])."""
    count = x.size // x.shape[-1]
    mean = jnp.mean(x, axis=(0, 1, 2))
    if axis_name is not None:
        count *= lax.axis_size(axis_name)
        mean = lax.pmean(mean, axis_name)
    # Unlike this, E[x^2] - E[x]^2 would lose digits where the mean is large.
    var = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2))
    if axis_name is not None:
        var = lax.pmean(var, axis_name)
    gain = scale * lax.rsqrt(var + epsilon)
    return x * gain + (bias - mean * gain), mean, var * (count / max(count - 1, 1))


class _NormVariables(NamedTuple):
    scale: jax.Array
    bias: jax.Array
    mean: nn.Variable
    var: nn.Variable


class ConvBatchNorm(BatchNorm):
    """A convolution followed by batch normalization.

    They form one module so that evaluation mode can fold the normalization into the kernel, which saves a pass over the
    activations.

    Attributes:
      features: Number of output channels.
      kernel_size: Side of the square kernel, or its (height, width); odd.
      stride: Stride of the convolution.
      groups: Number of groups into which the channels are split, each convolved separately; with as many groups as
        channels, the convolution is depthwise.
      use_bias: Whether the convolution has its own bias, as in some networks. Subtracting the batch mean cancels it, so
        it gets no gradient.
      kernel_init: Initializer of the kernel.
    """

    features: int
    kernel_size: int | tuple[int, int] = 3
    stride: int = 1
    groups: int = 1
    use_bias: bool = False
    kernel_init: Callable = kaiming_normal_fan_out

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps x [B, H, W, C] to [B, H', W', features]; padding keeps H and W at stride 1."""
        size = (self.kernel_size, self.kernel_size) if isinstance(self.kernel_size, int) else self.kernel_size
        shape = (*size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, np.promote_types(self.dtype, np.float32))
        norm = self._variables(self.features)
        offset: Any = 0
        if self.use_bias:
            offset = self.param("conv_bias", nn.initializers.zeros, (self.features,), kernel.dtype)
        x, padding = x.astype(self.dtype), (size[0] // 2, size[1] // 2)

        if not train:
            gain, shift = self._by_averages(norm)
            x = convolve(x, (kernel * gain).astype(self.dtype), self.stride, padding, self.groups)
            return x + (shift + offset * gain).astype(self.dtype)
        x = convolve(x, kernel.astype(self.dtype), self.stride, padding, self.groups)
        if self.use_bias:
            x += offset.astype(self.dtype)
        return self._by_batch(x, norm)


class Classifier(nn.Module):
    """A linear layer; logits are computed and returned in at least float32.

    Attributes:
      num_classes: Number of classes.
      dtype: Dtype of the network.
      kernel_init: Initializer of the kernel.
      bias_init: Initializer of the bias; None is that of torch.nn.Linear.
    """

    num_classes: int
    dtype: Any = jnp.float32
    kernel_init: Callable = torch_kernel
    bias_init: Callable | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, D] to logits [B, num_classes]."""
        dtype = np.promote_types(self.dtype, np.float32)
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.num_classes), dtype)
        bias = self.param("bias", self.bias_init or torch_uniform(x.shape[-1]), (self.num_classes,), dtype)
        return x.astype(dtype) @ kernel + bias


# The classifier of the reference code's VGG and MobileNetV2.
small_classifier = partial(Classifier, kernel_init=nn.initializers.normal(0.01), bias_init=nn.initializers.zeros)
