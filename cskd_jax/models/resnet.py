"""Residual networks (He et al. 2016) with a width factor, in six variants.

- `resnet18` to `resnet152` are for small images: they have a 3x3 stem and four stages.
- The same names with `_crd` have no max-pool, as in the reference code of CRD (Tian et al. 2020,
  https://github.com/HobbitLong/RepDistiller) and in https://github.com/kuangliu/pytorch-cifar.
- The same names with `_224` are for ImageNet: they have a 7x7 stem, and the maps of their four stages have 1/4 to 1/32
  of the side of the image.
- `resnet8` to `resnet110`, `resnet8x4` and `resnet32x4` are the CIFAR networks of the reference code of CRD: they have
  three stages, either narrow or four times as wide.
- `resnet20_option_a` to `resnet110_option_a` have the parameter-free shortcuts that He et al. use on CIFAR and call
  option A: strided subsampling, with zeros for the additional channels.
- `resnet8_stem64` to `resnet32_stem64` are those of https://github.com/karanchahal/distiller: they have a stem of 64
  channels, a ReLU only at the end of a stage, and the means of the four quarters of the last map as the embedding.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cskd_jax.convolution import convolve
from cskd_jax.models.layers import (
    Classifier,
    ConvBatchNorm,
    kaiming_normal_fan_out,
    max_pool,
    mean_of_cells,
    scale_width,
)
from cskd_jax.models.outputs import ModelOutput


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with an identity or projection shortcut; the caller applies the last ReLU."""

    width: int
    stride: int
    conv: Any

    @nn.compact
    def __call__(self, x, *, train):
        y = nn.relu(self.conv(self.width, 3, self.stride, name="conv1")(x, train=train))
        y = self.conv(self.width, 3, name="conv2")(y, train=train)
        return self._shortcut(x, train) + y

    def _shortcut(self, x, train):
        if self.stride == 1 and x.shape[-1] == self.width:
            return x
        return self.conv(self.width, 1, self.stride, name="downsample")(x, train=train)


class PaddedBlock(BasicBlock):
    """Two 3x3 convolutions with a parameter-free shortcut; the caller applies the last ReLU.

    The shortcut subsamples the pixels with the stride, and pads the channels with zeros before and after.
    """

    def _shortcut(self, x, train):
        del train
        missing = self.width - x.shape[-1]
        pads = ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2))
        return jnp.pad(x[:, :: self.stride, :: self.stride], pads)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, the last with four times the channels, and a shortcut.

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
    """Residual network: a stem, a 3x3 max-pool, and stages that, except for the first, halve the side of the maps.

    Attributes:
      num_classes: Number of classes.
      stage_sizes: Numbers of blocks of the stages.
      block: Class of the blocks: BasicBlock, PaddedBlock or Bottleneck.
      width: Factor on the widths of the stem and the stages.
      stage_widths: Numbers of channels of the stages at width 1, before the block's expansion.
      stem_width: Number of channels of the stem at width 1; None takes the width of the first stage.
      stem_kernel_size: Side of the stem's kernel.
      stem_stride: Stride of the stem.
      pool_stride: Stride of the max-pool; None leaves the max-pool out.
      relu_between_blocks: Whether a ReLU follows every block, or only the last block of each stage.
      pool_cells: Number of cells along each side of the last map; the means of the cells are the embedding.
      projection_features: Number of channels to which a 1x1 convolution without bias maps the returned features of the
        last stage (`branch4` of the networks of Chen et al. 2020, https://github.com/xeanzheng/CSKD); None leaves it
        out. Logits and preactivations do not depend on it.
      dtype: Dtype of the computation; parameters, batch statistics and logits are at least float32.
      axis_name: Name of the mapped axis over which the batch is split, for the batch statistics; None on one device.
    """

    num_classes: int
    stage_sizes: tuple[int, ...]
    block: type[nn.Module]
    width: float = 1.0
    stage_widths: tuple[int, ...] = (64, 128, 256, 512)
    stem_width: int | None = None
    stem_kernel_size: int = 3
    stem_stride: int = 1
    pool_stride: int | None = 1
    relu_between_blocks: bool = True
    pool_cells: int = 1
    projection_features: int | None = None
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @property
    def preactivation_norms(self) -> tuple[str, ...]:
        """Returns the paths of the batch normalizations that end the stages, before the shortcut is added."""
        last = "conv3" if self.block is Bottleneck else "conv2"
        return tuple(f"stage{stage}_block{blocks}/{last}" for stage, blocks in enumerate(self.stage_sizes, start=1))

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> ModelOutput:
        """Maps normalized floating-point images [B, H, W, C] to a ModelOutput with a map for each stage."""
        conv = partial(ConvBatchNorm, dtype=self.dtype, axis_name=self.axis_name)
        # Jitted so that identical blocks are traced and lowered once; a ResNet101 has 23 in a row.
        block = nn.jit(self.block, static_argnames=("train",))
        stem_width = scale_width(self.stem_width or self.stage_widths[0], self.width)
        widths = [scale_width(stage_width, self.width) for stage_width in self.stage_widths]
        x = nn.relu(conv(stem_width, self.stem_kernel_size, self.stem_stride, name="stem")(images, train=train))
        if self.pool_stride is not None:
            x = max_pool(x, self.pool_stride)
        stem = x
        features, preactivations = [], []
        for stage, (num_blocks, width) in enumerate(zip(self.stage_sizes, widths, strict=True)):
            for index in range(num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                y = block(width, stride, conv, name=f"stage{stage + 1}_block{index + 1}")(x, train=train)
                x = nn.relu(y) if self.relu_between_blocks or index == num_blocks - 1 else y
            features.append(x)
            preactivations.append(y)
        embedding = jnp.mean(x, axis=(1, 2)) if self.pool_cells == 1 else mean_of_cells(x, self.pool_cells)
        logits = Classifier(self.num_classes, dtype=self.dtype, name="classifier")(embedding)
        if self.projection_features is not None:
            shape = (1, 1, x.shape[-1], self.projection_features)
            kernel = self.param("projection", kaiming_normal_fan_out, shape, np.promote_types(self.dtype, np.float32))
            features[-1] = convolve(x, kernel.astype(x.dtype), 1, 0)
        return ModelOutput(logits, tuple(features), embedding, tuple(preactivations), (stem, *features))


_SIZES = {
    "resnet18": partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock),
    "resnet34": partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BasicBlock),
    "resnet50": partial(ResNet, stage_sizes=(3, 4, 6, 3), block=Bottleneck),
    "resnet101": partial(ResNet, stage_sizes=(3, 4, 23, 3), block=Bottleneck),
    "resnet152": partial(ResNet, stage_sizes=(3, 8, 36, 3), block=Bottleneck),
}


def _comparison(depth, stage_widths=(16, 32, 64), stem_width=16, block: Any = BasicBlock, **settings):
    """Returns a CIFAR network with three stages of two-layer blocks: 6 n + 2 layers with n blocks in each stage."""
    sizes, settings = ((depth - 2) // 6,) * 3, {"pool_stride": None, **settings}
    return partial(ResNet, stage_sizes=sizes, block=block, stage_widths=stage_widths, stem_width=stem_width, **settings)


RESNETS = {
    **_SIZES,
    **{f"{name}_crd": partial(small, pool_stride=None) for name, small in _SIZES.items()},
    **{
        f"{name}_224": partial(small, stem_kernel_size=7, stem_stride=2, pool_stride=2)
        for name, small in _SIZES.items()
    },
    **{f"resnet{depth}": _comparison(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": _comparison(depth, (64, 128, 256), 32) for depth in (8, 32)},
    **{f"resnet{depth}_option_a": _comparison(depth, block=PaddedBlock) for depth in (20, 32, 44, 56, 110)},
    **{
        f"resnet{depth}_stem64": _comparison(depth, stem_width=64, relu_between_blocks=False, pool_cells=2)
        for depth in (8, 14, 20, 26, 32)
    },
}
