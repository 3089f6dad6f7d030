"""Variational information distillation: the student's maps learn to predict the teacher's."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._arrays import pool_to_common_size
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_shape, pair_stages
from cskd_jax.losses._connectors import Pointwise
from cskd_jax.losses.base import LossInputs, Method, Positive

# This number is added to every variance, so that none is zero.
MIN_VARIANCE = 1e-5


def vid_loss(mean: jax.Array, teacher_features: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Computes variational information distillation at one stage: a Gaussian negative log-likelihood.

    The loss is the mean of ((t - mu(s))^2 / v_c + ln v_c) / 2, which leaves out a constant, with one variance for each
    channel, v = softplus(rho) + 1e-5. Time and memory are O(B H W D).

    Args:
      mean: Prediction mu(s) of the teacher's map from the student's, float [B, ..., D].
      teacher_features: Maps of the teacher, float, in the shape of mean, never differentiated.
      log_scale: Trained parameters rho that determine the variances, float [D].

    Returns:
      A scalar of at least float32: the mean over all elements. It can be negative.

    Raises:
      TypeError: If an argument is not floating point.
      ValueError: If shapes do not fit.

    References:
      Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge Transfer", CVPR 2019,
      https://arxiv.org/abs/1904.05835.
    """
    check_float("mean", mean, min_ndim=2)
    check_float("teacher_features", teacher_features, min_ndim=2)
    check_same_shape(mean=mean, teacher_features=teacher_features)
    check_float("log_scale", log_scale)
    if jnp.shape(log_scale) != mean.shape[-1:]:
        raise ValueError(f"log_scale must have shape {mean.shape[-1:]}: (channels,), got {jnp.shape(log_scale)}")
    variance = jax.nn.softplus(at_least_float32(log_scale)) + MIN_VARIANCE
    difference = at_least_float32(mean) - lax.stop_gradient(at_least_float32(teacher_features))
    return jnp.mean(jnp.square(difference) / variance + jnp.log(variance)) / 2


class MeanNetwork(nn.Module):
    """The network mu of `vid_loss`: three 1x1 convolutions without bias, with ReLU in between.

    Attributes:
      features: Number of output channels.
      hidden: Number of channels in between; None takes as many as `features`.
    """

    features: int
    hidden: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [..., D] to [..., features]."""
        hidden = self.hidden or self.features
        x = nn.relu(Pointwise(hidden, name="layer1")(x))
        x = nn.relu(Pointwise(hidden, name="layer2")(x))
        return Pointwise(self.features, name="layer3")(x)


class VID(Method):
    """Sums `vid_loss` over all stages, with trainable `MeanNetwork`s and variances.

    Where maps differ in size, the larger is average-pooled to the smaller before the `MeanNetwork`.

    Attributes:
      initial_variance: Variance of every channel at the start, greater than 1e-5.
    """

    initial_variance: Positive = 5.0
    version: ClassVar[int] = 2

    @nn.compact
    def __call__(self, inputs: LossInputs):
        if not self.initial_variance > MIN_VARIANCE:
            raise ValueError(f"initial_variance must be greater than {MIN_VARIANCE}, got {self.initial_variance}")
        # This is the inverse of softplus, in a form that does not overflow for large v, unlike log(expm1(v)).
        excess = self.initial_variance - MIN_VARIANCE
        start = nn.initializers.constant(excess + math.log(-math.expm1(-excess)))
        total = 0.0
        pairs = pair_stages(inputs.student.stages, inputs.teacher.stages)
        for stage, (student, teacher) in enumerate(pairs, start=1):
            student, teacher = pool_to_common_size(student, teacher)
            mean = MeanNetwork(teacher.shape[-1], name=f"mean{stage}")(student)
            log_scale = self.param(f"log_scale{stage}", start, teacher.shape[-1:], mean.dtype)
            total += vid_loss(mean, teacher, log_scale)
        return total, {}
