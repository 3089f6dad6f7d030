"""ShuffleNet v1 (Zhang et al. 2018) and v2 (Ma et al. 2018) for small images.

These are the networks in the reference code of CRD (Tian et al. 2020, https://github.com/HobbitLong/RepDistiller).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cskd_jax.models.layers import Classifier, ConvBatchNorm, average_pool, scale_width, torch_kernel
from cskd_jax.models.outputs import ModelOutput


def shuffle_channels(x: jax.Array, groups: int) -> jax.Array:
    """Reorders the channels [..., D]: the first channel of every group, then the second of every group, and so on."""
    grouped = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return jnp.swapaxes(grouped, -1, -2).reshape(x.shape)


class ShuffleBlockV1(nn.Module):
    """Grouped 1x1, shuffle, 3x3 depthwise, grouped 1x1; added to the input, or concatenated with its average-pool.

    The caller applies the last ReLU. There is another ReLU after the depthwise convolution; the paper does not have it.
    """

    features: int
    stride: int
    first_groups: int
    groups: int
    conv: Any

    @nn.compact
    def __call__(self, x, *, train):
        features = self.features if self.stride == 1 else self.features - x.shape[-1]
        hidden = scale_width(features, 0.25, self.groups)
        y = nn.relu(self.conv(hidden, 1, groups=self.first_groups, name="conv1")(x, train=train))
        y = shuffle_channels(y, self.first_groups)
        y = nn.relu(self.conv(hidden, 3, self.stride, groups=hidden, name="depthwise")(y, train=train))
        y = self.conv(features, 1, groups=self.groups, name="conv2")(y, train=train)
        if self.stride == 1:
            return x + y
        return jnp.concatenate([y, average_pool(x, self.stride)], axis=-1)


class ShuffleBlockV2(nn.Module):
    """Two branches, then a shuffle of their channels; at stride 1 one branch is half of the input, unchanged.

    The caller applies the last ReLU, which leaves that half unchanged because it is the output of a ReLU.
    """

    features: int
    stride: int
    conv: Any

    @nn.compact
    def __call__(self, x, *, train):
        half = self.features // 2
        if self.stride == 1:
            left, x = x[..., :half], x[..., half:]
        else:
            left = self.conv(x.shape[-1], 3, self.stride, groups=x.shape[-1], name="left_depthwise")(x, train=train)
            left = self.conv(half, 1, name="left_conv")(left, train=train)
        y = nn.relu(self.conv(half, 1, name="conv1")(x, train=train))
        y = self.conv(half, 3, self.stride, groups=half, name="depthwise")(y, train=train)
        y = self.conv(half, 1, name="conv2")(y, train=train)
        return shuffle_channels(jnp.concatenate([left, y], axis=-1), 2)


class ShuffleNet(nn.Module):
    """1x1 stem, three stages that each begin with stride 2, and in v2 a 1x1 head.

    The features of the last stage are taken after the head where there is one, so that they are the input of the
    pooling; its preactivations and its map in `maps` are taken before the head.

    Attributes:
      num_classes: Number of classes.
      version: Version of the blocks, 1 or 2.
      stage_sizes: Numbers of blocks of the stages.
      stage_widths: Numbers of channels of the stages at width 1.
      head_width: Number of channels of the head at width 1; None leaves the head out.
      groups: Number of groups of the 1x1 convolutions of version 1.
      width: Factor on the widths of the stem, the stages and, if above 1, the head.
      dtype: Dtype of the computation; parameters, batch statistics and logits are at least float32.
      axis_name: Name of the mapped axis over which the batch is split, for the batch statistics; None on one device.
    """

    num_classes: int
    version: int
    stage_sizes: tuple[int, ...]
    stage_widths: tuple[int, ...]
    head_width: int | None = None
    groups: int = 2
    width: float = 1.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> ModelOutput:
        """Maps normalized floating-point images [B, H, W, C] to a ModelOutput with three stage maps."""
        conv = partial(ConvBatchNorm, kernel_init=torch_kernel, dtype=self.dtype, axis_name=self.axis_name)
        x = nn.relu(conv(scale_width(24, self.width, self.groups), 1, name="stem")(images, train=train))
        maps, preactivations = [x], []
        for stage, (num_blocks, stage_width) in enumerate(zip(self.stage_sizes, self.stage_widths, strict=True)):
            width = scale_width(stage_width, self.width, self.groups)
            for index in range(num_blocks):
                name, stride = f"stage{stage + 1}_block{index + 1}", 2 if index == 0 else 1
                if self.version == 1:
                    # The stem has few channels, which are not split.
                    first_groups = 1 if stage == index == 0 else self.groups
                    block = ShuffleBlockV1(width, stride, first_groups, self.groups, conv, name=name)
                else:
                    block = ShuffleBlockV2(width, stride, conv, name=name)
                y = block(x, train=train)
                x = nn.relu(y)
            maps.append(x)
            preactivations.append(y)
        if self.head_width is not None:
            width = scale_width(self.head_width, max(self.width, 1))
            x = nn.relu(conv(width, 1, name="head")(x, train=train))
        embedding = jnp.mean(x, axis=(1, 2))
        logits = Classifier(self.num_classes, dtype=self.dtype, name="classifier")(embedding)
        return ModelOutput(logits, (*maps[1:-1], x), embedding, tuple(preactivations), tuple(maps))


SHUFFLENETS = {
    "shufflenet_v1": partial(ShuffleNet, version=1, stage_sizes=(4, 8, 4), stage_widths=(240, 480, 960), groups=3),
    "shufflenet_v2": partial(
        ShuffleNet, version=2, stage_sizes=(4, 8, 4), stage_widths=(116, 232, 464), head_width=1024
    ),
}
