"""MobileNetV2 (Sandler et al. 2018) for small images."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cskd_jax.models.layers import ConvBatchNorm, scale_width, small_classifier
from cskd_jax.models.outputs import ModelOutput


def _blocks(expansion, channels, number, stride):
    return ((expansion, channels, stride),) + ((expansion, channels, 1),) * (number - 1)


# The blocks (expansion, channels, stride) of each stage.
_STAGES = (
    _blocks(1, 16, 1, 1) + _blocks(6, 24, 2, 1),
    _blocks(6, 32, 3, 2),
    _blocks(6, 64, 4, 2) + _blocks(6, 96, 3, 1),
    _blocks(6, 160, 3, 2) + _blocks(6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection, with an identity shortcut where the shapes allow it.

    The expansion convolution is present even where it expands by 1, as in networks for CIFAR such as those in the
    reference code of CRD (Tian et al. 2020, https://github.com/HobbitLong/RepDistiller).
    """

    features: int
    expansion: int
    stride: int
    conv: Any
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x, *, train):
        hidden = x.shape[-1] * self.expansion
        y = self.activation(self.conv(hidden, 1, name="expand")(x, train=train))
        y = self.activation(self.conv(hidden, 3, self.stride, groups=hidden, name="depthwise")(y, train=train))
        y = self.conv(self.features, 1, name="project")(y, train=train)
        return x + y if y.shape == x.shape else y


class MobileNetV2(nn.Module):
    """3x3 stem, inverted residuals in four stages with strides 1, 2, 2, 2, and a 1x1 head that ends the last stage.

    Blocks end linearly, so `features` and `preactivations` of the first three stages are the same maps, of both signs.
    The features of the last stage are taken after the head, so that they are the input of the pooling; its
    preactivations and its map in `maps` are taken before the head.

    Attributes:
      num_classes: Number of classes.
      width: Factor on the widths of the stem, the stages and, if above 1, the head.
      stem_stride: Stride of the stem.
      activation: Activation after every convolution except the linear ones.
      dtype: Dtype of the computation; parameters, batch statistics and logits are at least float32.
      axis_name: Name of the mapped axis over which the batch is split, for the batch statistics; None on one device.
    """

    num_classes: int
    width: float = 1.0
    stem_stride: int = 1
    activation: Callable[[jax.Array], jax.Array] = nn.relu6
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @property
    def preactivation_norms(self) -> tuple[str, ...]:
        """Returns the paths of the batch normalizations that end the stages, before the shortcut is added."""
        return tuple(f"stage{stage}_block{len(blocks)}/project" for stage, blocks in enumerate(_STAGES, start=1))

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> ModelOutput:
        """Maps normalized floating-point images [B, H, W, C] to a ModelOutput with four stage maps."""
        conv = partial(ConvBatchNorm, dtype=self.dtype, axis_name=self.axis_name)
        x = conv(scale_width(32, self.width), 3, self.stem_stride, name="stem")(images, train=train)
        x = self.activation(x)
        maps = [x]
        for stage, blocks in enumerate(_STAGES, start=1):
            for index, (expansion, channels, stride) in enumerate(blocks, start=1):
                width = scale_width(channels, self.width)
                name = f"stage{stage}_block{index}"
                x = InvertedResidual(width, expansion, stride, conv, self.activation, name=name)(x, train=train)
            maps.append(x)
        x = self.activation(conv(scale_width(1280, max(self.width, 1)), 1, name="head")(x, train=train))
        embedding = jnp.mean(x, axis=(1, 2))
        logits = small_classifier(self.num_classes, dtype=self.dtype, name="classifier")(embedding)
        return ModelOutput(logits, (*maps[1:-1], x), embedding, tuple(maps[1:]), tuple(maps))


MOBILENETS = {
    # This has ReLU6 as in the paper, and a last map of side 4 for images of side 32, as in ResNet, VGG and Inception.
    "mobilenet_v2": MobileNetV2,
    # This has plain ReLU, and a stem that halves the side, as in the reference code of CRD (Tian et al. 2020), where it
    # is used with width 0.5.
    "mobilenet_v2_crd": partial(MobileNetV2, stem_stride=2, activation=nn.relu),
}
