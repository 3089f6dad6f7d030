"""Knowledge review: late stages of the student, fused into earlier ones, learn from the teacher's stages."""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._arrays import average_pool, resize
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_shape, pair_stages
from cskd_jax.losses._connectors import Connector, Pointwise
from cskd_jax.losses.base import Count, LossInputs, Method

# Side lengths of the maps that are compared in addition to the full size, each with half the weight of the previous
# one.
_POOLED_SIZES = (4, 2, 1)


def hierarchical_context_loss(student_features: jax.Array, teacher_features: jax.Array) -> jax.Array:
    """Computes the hierarchical context loss (HCL) at one stage: mean squared errors at several sizes of the maps.

    The errors are those of the full-size maps, with weight 1, and of the maps average-pooled to each of 4x4, 2x2 and
    1x1 that is smaller than the map, with weights 1/2, 1/4 and so on in turn. Their sum is divided by the sum of the
    weights. Time and memory are O(B H W D).

    Args:
      student_features: Maps of the student, fused and mapped to the teacher's channels, float [B, H, W, D].
      teacher_features: Maps of the teacher, float, in the shape of student_features, never differentiated.

    Returns:
      A scalar of at least float32, from means over the elements of each size.

    Raises:
      TypeError: If the features are not floating point.
      ValueError: If the features do not have 4 dimensions, or if shapes differ.

    References:
      Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, https://arxiv.org/abs/2104.09044.
    """
    check_float("student_features", student_features, ndim=4)
    check_float("teacher_features", teacher_features, ndim=4)
    check_same_shape(student_features=student_features, teacher_features=teacher_features)
    difference = at_least_float32(student_features) - lax.stop_gradient(at_least_float32(teacher_features))
    total, weight, weights = jnp.mean(jnp.square(difference)), 1.0, 1.0
    for size in _POOLED_SIZES:
        if size < min(difference.shape[1:3]):
            weight /= 2
            weights += weight
            # Pooling is linear, so the pooled difference is the difference of the pooled maps.
            total += weight * jnp.mean(jnp.square(average_pool(difference, (size, size))))
    return total / weights


class AttentionFusion(nn.Module):
    """A layer that fuses a stage with the already fused later stages (attention-based fusion, ABF).

    The stage is mapped by a 1x1 convolution with batch normalization to `mid_channels`, and resized to the teacher's
    map. Two attention maps, from a 1x1 convolution of both inputs and a sigmoid, weight it and the later stages
    (enlarged by nearest neighbor). A 3x3 convolution with batch normalization gives the output.

    Attributes:
      mid_channels: Number of channels of the maps that are fused.
      features: Number of output channels.
      axis_name: Name of the mapped axis over which the batch is split, or None.
    """

    mid_channels: int
    features: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, later: jax.Array | None, size: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """Fuses x [B, H, W, D] with the later stages.

        Args:
          x: Map of the stage, [B, H, W, D].
          later: Fused later stages, [B, H', W', mid_channels], or None for the last stage.
          size: Height and width of the teacher's map.

        Returns:
          The output [B, *size, features] and the fused stage [B, *size, mid_channels].
        """
        # This is torch's kaiming_uniform_(a=1).
        init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        x = Connector(self.mid_channels, axis_name=self.axis_name, kernel_init=init, name="reduce")(x)
        x = resize(x, size)
        if later is not None:
            later = resize(later, size)
            weights = nn.sigmoid(Pointwise(2, use_bias=True, name="attention")(jnp.concatenate([x, later], axis=-1)))
            x = x * weights[..., :1] + later * weights[..., 1:]
        output = Connector(self.features, 3, axis_name=self.axis_name, kernel_init=init, name="output")(x)
        return output, x


class ReviewKD(Method):
    """Sums `hierarchical_context_loss` over all stages, each stage of the student fused with its later ones.

    For the teacher, the pre-activations of the stages are used. The pooled embedding, a map of size 1x1, is the last
    stage. The authors increase the loss over the first 20 epochs; that is a schedule of its weight, not part of the
    loss.

    Attributes:
      variant: Maps of the student. "cifar100" takes them as each stage passes them on, after its ReLU, as the authors'
        code (https://github.com/dvlab-research/ReviewKD) and mdistiller (https://github.com/megvii-research/mdistiller)
        do for CIFAR-100; "imagenet" takes the pre-activations, as both do for ImageNet.
      mid_channels: Channels of the maps that are fused; None takes the number of channels of the student's last stage,
        at most 512.
      with_embedding: Whether the pooled embedding counts as a stage.
    """

    variant: Literal["cifar100", "imagenet"] = "cifar100"
    mid_channels: Count | None = None
    with_embedding: bool = True
    version: ClassVar[int] = 2

    @nn.compact
    def __call__(self, inputs: LossInputs):
        student_stages = inputs.student.stages if self.variant == "cifar100" else inputs.student.preactivations
        pairs = pair_stages(student_stages, inputs.teacher.preactivations)
        if self.with_embedding:
            student, teacher = inputs.student.embedding, inputs.teacher.embedding
            pairs.append((student[:, None, None, :], teacher[:, None, None, :]))
        mid_channels = self.mid_channels or min(512, pairs[-1][0].shape[-1])
        total, fused = 0.0, None
        for stage, (student, teacher) in reversed(list(enumerate(pairs, start=1))):
            fusion = AttentionFusion(mid_channels, teacher.shape[-1], self.axis_name, name=f"fusion{stage}")
            output, fused = fusion(student, fused, (teacher.shape[1], teacher.shape[2]))
            total += hierarchical_context_loss(output, teacher)
        return total, {}
