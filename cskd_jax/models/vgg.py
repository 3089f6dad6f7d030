"""VGG (Simonyan and Zisserman 2015) with batch normalization for small images.

This is the network in the reference code of CRD (Tian et al. 2020, https://github.com/HobbitLong/RepDistiller).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cskd_jax.models.layers import ConvBatchNorm, scale_width, small_classifier
from cskd_jax.models.outputs import ModelOutput


class VGG(nn.Module):
    """3x3 convolutions: a stem and four stages, each of which, except the last, begins with a 2x2 max-pool.

    The stem is what other descriptions of VGG call its first block. The maps of an image of side 32 therefore have
    sides 16, 8, 4, 4, and are paired with the four stages of the other networks. For images of height 64, the last
    stage begins with a max-pool too, as in the reference code. A single linear layer classifies.

    Attributes:
      num_classes: Number of classes.
      stem_size: Number of convolutions of the stem.
      stage_sizes: Numbers of convolutions of the stages.
      width: Factor on the widths of the stem and the stages.
      stage_widths: Numbers of channels of the stem and of each stage at width 1.
      dtype: Dtype of the computation; parameters, batch statistics and logits are at least float32.
      axis_name: Name of the mapped axis over which the batch is split, for the batch statistics; None on one device.
    """

    num_classes: int
    stem_size: int
    stage_sizes: tuple[int, ...]
    width: float = 1.0
    stage_widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @property
    def preactivation_norms(self) -> tuple[str, ...]:
        """Returns the paths of the batch normalizations that end the stages."""
        return tuple(f"stage{stage}_conv{layers}" for stage, layers in enumerate(self.stage_sizes, start=1))

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> ModelOutput:
        """Maps normalized floating-point images [B, H, W, C] to a ModelOutput with four stage maps.

        H and W must be at least 8.
        """
        conv = partial(ConvBatchNorm, use_bias=True, dtype=self.dtype, axis_name=self.axis_name)
        x, features, preactivations = images, [], []
        sizes = (self.stem_size, *self.stage_sizes)
        for stage, (num_layers, stage_width) in enumerate(zip(sizes, self.stage_widths, strict=True)):
            if 0 < stage < len(sizes) - 1 or (stage == len(sizes) - 1 and images.shape[1] == 64):
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for index in range(num_layers):
                name = f"stage{stage}_conv{index + 1}" if stage else f"stem_conv{index + 1}"
                y = conv(scale_width(stage_width, self.width), name=name)(x, train=train)
                x = nn.relu(y)
            features.append(x)
            preactivations.append(y)
        embedding = jnp.mean(x, axis=(1, 2))
        logits = small_classifier(self.num_classes, dtype=self.dtype, name="classifier")(embedding)
        return ModelOutput(logits, tuple(features[1:]), embedding, tuple(preactivations[1:]), tuple(features))


VGGS = {
    "vgg8": partial(VGG, stem_size=1, stage_sizes=(1, 1, 1, 1)),
    "vgg11": partial(VGG, stem_size=1, stage_sizes=(1, 2, 2, 2)),
    "vgg13": partial(VGG, stem_size=2, stage_sizes=(2, 2, 2, 2)),
    "vgg16": partial(VGG, stem_size=2, stage_sizes=(2, 3, 3, 3)),
    "vgg19": partial(VGG, stem_size=2, stage_sizes=(2, 4, 4, 4)),
}
