"""Inception-v3 (Szegedy et al. 2016) for small images."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cskd_jax.models.layers import Classifier, ConvBatchNorm, average_pool, max_pool, scale_width
from cskd_jax.models.outputs import ModelOutput

# A block is a tuple of branches, and a branch is a tuple of layers: (channels, kernel) or (channels, kernel, stride) of
# a convolution, ("split", channels) of a 1x3 and a 3x1 convolution side by side, or a pool.
_AVERAGE = ("average",)
_MAX_HALVE = ("max", 2)


def _mixed_5(pooled):
    return (
        ((64, 1),),
        ((48, 1), (64, 5)),
        ((64, 1), (96, 3), (96, 3)),
        (_AVERAGE, (pooled, 1)),
    )


_MIXED_6A = (
    ((384, 3, 2),),
    ((64, 1), (96, 3), (96, 3, 2)),
    (_MAX_HALVE,),
)


def _mixed_6(hidden):
    row, column = (1, 7), (7, 1)
    return (
        ((192, 1),),
        ((hidden, 1), (hidden, row), (192, column)),
        ((hidden, 1), (hidden, column), (hidden, row), (hidden, column), (192, row)),
        (_AVERAGE, (192, 1)),
    )


_MIXED_7A = (
    ((192, 1), (320, 3, 2)),
    ((192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
    (_MAX_HALVE,),
)
_MIXED_7 = (
    ((320, 1),),
    ((384, 1), ("split", 384)),
    ((448, 1), (384, 3), ("split", 384)),
    (_AVERAGE, (192, 1)),
)

# The blocks of each stage.
_STAGES = (
    ((((32, 3), (32, 3), (64, 3)),),),
    ((((_MAX_HALVE, (80, 1), (192, 3)),)), _mixed_5(32), _mixed_5(64), _mixed_5(64)),
    (_MIXED_6A, _mixed_6(128), _mixed_6(160), _mixed_6(160), _mixed_6(192)),
    (_MIXED_7A, _MIXED_7, _MIXED_7),
)


class Mixed(nn.Module):
    """Branches side by side, with their channels concatenated; the caller applies the last ReLU."""

    branches: tuple[tuple[tuple, ...], ...]
    width: float
    conv: Any

    @nn.compact
    def __call__(self, x, *, train):
        return jnp.concatenate([self._branch(x, number, train) for number in range(1, len(self.branches) + 1)], axis=-1)

    def _branch(self, x, number, train):
        for index, (kind, *settings) in enumerate(self.branches[number - 1], start=1):
            name = f"branch{number}_conv{index}"
            # This is the ReLU between layers; it does not change inputs that come from a ReLU or from a pool after a
            # ReLU.
            x = nn.relu(x) if index > 1 else x
            if kind == "average":
                x = average_pool(x, 1)
            elif kind == "max":
                x = max_pool(x, *settings)
            elif kind == "split":
                width = scale_width(settings[0], self.width)
                both = [
                    self.conv(width, kernel, name=f"{name}_{suffix}")(x, train=train)
                    for kernel, suffix in (((1, 3), "row"), ((3, 1), "column"))
                ]
                x = jnp.concatenate(both, axis=-1)
            else:
                x = self.conv(scale_width(kind, self.width), *settings, name=name)(x, train=train)
        return x


class InceptionV3(nn.Module):
    """Inception-v3 for images of side 32: 3 convolutions, then Mixed 5, 6 and 7, in stages with strides 1, 2, 2, 2.

    Two of the five halvings of the network for ImageNet are left out (the stride of the first convolution, the second
    max-pool), and every convolution and pool pads, so that the maps of an image of side 32 have sides 32, 16, 8 and 4,
    as in ResNet. The parameters are unaffected. There is no auxiliary classifier and no dropout.

    Attributes:
      num_classes: Number of classes.
      width: Factor on the number of channels of every convolution.
      dtype: Dtype of the computation; parameters, batch statistics and logits are at least float32.
      axis_name: Name of the mapped axis over which the batch is split, for the batch statistics; None on one device.
    """

    num_classes: int
    width: float = 1.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> ModelOutput:
        """Maps normalized floating-point images [B, H, W, C] to a ModelOutput with four stage maps."""
        conv = partial(ConvBatchNorm, epsilon=1e-3, dtype=self.dtype, axis_name=self.axis_name)
        x, features, preactivations = images, [], []
        for stage, blocks in enumerate(_STAGES, start=1):
            for index, branches in enumerate(blocks, start=1):
                y = Mixed(branches, self.width, conv, name=f"stage{stage}_block{index}")(x, train=train)
                x = nn.relu(y)
            features.append(x)
            preactivations.append(y)
        embedding = jnp.mean(x, axis=(1, 2))
        logits = Classifier(self.num_classes, dtype=self.dtype, name="classifier")(embedding)
        return ModelOutput(logits, tuple(features), embedding, tuple(preactivations))


INCEPTIONS = {"inception_v3": InceptionV3}
