"""Residual networks for small images (He et al. 2016, with a 3x3 stem), 18 to 152 layers, with a width factor."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cskd_jax.models.layers import Classifier, ConvBatchNorm, convolve, kaiming_normal_fan_out
from cskd_jax.models.outputs import ModelOutput


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around an identity or projection shortcut; the caller applies the last ReLU."""

    width: int
    stride: int
    conv: Any

    @nn.compact
    def __call__(self, x, *, train):
        y = nn.relu(self.conv(self.width, 3, self.stride, name="conv1")(x, train=train))
        y = self.conv(self.width, 3, name="conv2")(y, train=train)
        if self.stride != 1 or x.shape[-1] != self.width:
            x = self.conv(self.width, 1, self.stride, name="downsample")(x, train=train)
        return x + y


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride), 1x1 with four times the channels, around a shortcut.

    The caller applies the last ReLU.
    """

    width: int
    stride: int
    conv: Any
    expansion = 4

    @nn.compact
    def __call__(self, x, *, train):
        features = self.width * self.expansion
        y = nn.relu(self.conv(self.width, 1, name="conv1")(x, train=train))
        y = nn.relu(self.conv(self.width, 3, self.stride, name="conv2")(y, train=train))
        y = self.conv(features, 1, name="conv3")(y, train=train)
        if self.stride != 1 or x.shape[-1] != features:
            x = self.conv(features, 1, self.stride, name="downsample")(x, train=train)
        return x + y


class ResNet(nn.Module):
    """Residual network: 3x3 stem, 3x3 max-pool with stride 1, four stages with strides 1, 2, 2, 2.

    Attributes:
      num_classes: size of the output.
      stage_sizes: blocks per stage.
      block: BasicBlock or Bottleneck.
      width: factor on the stage widths.
      stage_widths: channels of each stage at width 1, before the block's expansion.
      projection_features: if given, a 1x1 convolution without bias maps the last stage's features to that many
        channels before they are handed out (`branch4` of the released code's networks). Logits and preactivations
        do not see it.
      dtype: of the computation; parameters, batch statistics and logits are at least float32.
      axis_name: mapped axis over which the batch is split, for the batch statistics; None on one device.
    """

    num_classes: int
    stage_sizes: tuple[int, ...]
    block: type[nn.Module]
    width: float = 1.0
    stage_widths: tuple[int, ...] = (64, 128, 256, 512)
    projection_features: int | None = None
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> ModelOutput:
        """Images [B, H, W, C], normalized, floating point -> ModelOutput with four stage maps."""
        conv = partial(ConvBatchNorm, dtype=self.dtype, axis_name=self.axis_name)
        widths = [round(stage_width * self.width) for stage_width in self.stage_widths]
        if min(widths) < 1:
            raise ValueError(f"width {self.width} leaves a stage without channels")
        x = nn.relu(conv(widths[0], 3, name="stem")(images, train=train))
        x = nn.max_pool(x, (3, 3), strides=(1, 1), padding=((1, 1), (1, 1)))
        features, preactivations = [], []
        for stage, (num_blocks, width) in enumerate(zip(self.stage_sizes, widths, strict=True)):
            for index in range(num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                y = self.block(width, stride, conv, name=f"stage{stage + 1}_block{index + 1}")(x, train=train)
                x = nn.relu(y)
            features.append(x)
            preactivations.append(y)
        embedding = jnp.mean(x, axis=(1, 2))
        logits = Classifier(self.num_classes, dtype=self.dtype, name="classifier")(embedding)
        if self.projection_features is not None:
            shape = (1, 1, x.shape[-1], self.projection_features)
            kernel = self.param("projection", kaiming_normal_fan_out, shape, np.promote_types(self.dtype, np.float32))
            features[-1] = convolve(x, kernel.astype(x.dtype), 1, 0)
        return ModelOutput(logits, tuple(features), embedding, tuple(preactivations))


resnet18 = partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock)
resnet34 = partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BasicBlock)
resnet50 = partial(ResNet, stage_sizes=(3, 4, 6, 3), block=Bottleneck)
resnet101 = partial(ResNet, stage_sizes=(3, 4, 23, 3), block=Bottleneck)
resnet152 = partial(ResNet, stage_sizes=(3, 8, 36, 3), block=Bottleneck)
