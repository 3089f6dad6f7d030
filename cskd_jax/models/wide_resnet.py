"""Wide residual networks (Zagoruyko and Komodakis 2016) for small images.

These are the networks in the reference code of CRD (Tian et al. 2020, https://github.com/HobbitLong/RepDistiller).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cskd_jax.models.layers import BatchNorm, Classifier, ConvBatchNorm, Convolution, scale_width
from cskd_jax.models.outputs import ModelOutput


class WideResNet(nn.Module):
    """Residual network with normalization and ReLU before the convolutions, in three stages with strides 1, 2, 2.

    The sum at the end of a stage is normalized by the part that follows, which is the next stage or the classifier:
    `preactivations` hold that normalized sum, `features` its positive part, and `maps` the sum itself.

    Attributes:
      num_classes: Number of classes.
      depth: Number of layers, 6 n + 4 with n blocks in each stage.
      widening: Factor k on the stage widths (not on the stem's).
      width: Factor on the widths of the stem and the stages.
      stage_widths: Numbers of channels of the stages at widening and width 1; the stem has as many as the first.
      norm_passes: Number of times that a training step updates the running statistics of the normalizations that
        produce `preactivations`: 1, or 2 where a method reads preactivations, as in the reference code, which then
        applies them once in the forward pass and once for the method.
      dtype: Dtype of the computation; parameters, batch statistics and logits are at least float32.
      axis_name: Name of the mapped axis over which the batch is split, for the batch statistics; None on one device.
    """

    num_classes: int
    depth: int
    widening: int
    width: float = 1.0
    stage_widths: tuple[int, ...] = (16, 32, 64)
    norm_passes: int = 1
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @property
    def preactivation_norms(self) -> tuple[str, ...]:
        """Returns the paths of the batch normalizations of the sums at the ends of the stages."""
        following = tuple(f"stage{stage}_block1_norm" for stage in range(2, len(self.stage_widths) + 1))
        return (*following, "norm")

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> ModelOutput:
        """Maps normalized floating-point images [B, H, W, C] to a ModelOutput with three stage maps."""
        normalize = partial(BatchNorm, dtype=self.dtype, axis_name=self.axis_name)
        # Several updates with the same statistics equal one update with a power of the momentum.
        normalize_stage = partial(normalize, momentum=BatchNorm.momentum**self.norm_passes)
        conv = partial(Convolution, dtype=self.dtype)
        conv_normalize = partial(ConvBatchNorm, dtype=self.dtype, axis_name=self.axis_name)
        x = conv(scale_width(self.stage_widths[0], self.width), name="stem")(images)
        maps, features, preactivations = [x], [], []
        for stage, stage_width in enumerate(self.stage_widths):
            width = scale_width(stage_width * self.widening, self.width)
            for index in range((self.depth - 4) // 6):
                name = f"stage{stage + 1}_block{index + 1}"
                ends_stage = index == 0 and stage > 0
                normalize_here = normalize_stage if ends_stage else normalize
                preactivation = normalize_here(name=f"{name}_norm")(x, train=train)
                y = nn.relu(preactivation)
                if ends_stage:
                    features.append(y)
                    preactivations.append(preactivation)
                stride = 2 if ends_stage else 1
                if y.shape[-1] != width or stride != 1:
                    x = conv(width, 1, stride, name=f"{name}_shortcut")(y)
                y = nn.relu(conv_normalize(width, 3, stride, name=f"{name}_conv1")(y, train=train))
                x = x + conv(width, name=f"{name}_conv2")(y)
            maps.append(x)
        preactivations.append(normalize_stage(name="norm")(x, train=train))
        features.append(nn.relu(preactivations[-1]))
        embedding = jnp.mean(features[-1], axis=(1, 2))
        classify = Classifier(self.num_classes, dtype=self.dtype, bias_init=nn.initializers.zeros, name="classifier")
        logits = classify(embedding)
        return ModelOutput(logits, tuple(features), embedding, tuple(preactivations), tuple(maps))


WIDE_RESNETS = {
    f"wrn_{depth}_{widening}": partial(WideResNet, depth=depth, widening=widening)
    for depth, widening in ((16, 1), (16, 2), (40, 1), (40, 2))
}
