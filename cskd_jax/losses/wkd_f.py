"""WKD-F: the channels of the student's map learn the teacher's mean and deviation, as Gaussians."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._arrays import cells, pool_to_common_size
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_shape
from cskd_jax.losses._connectors import Convolution, Normalization
from cskd_jax.losses.base import Count, LossInputs, Method, Positive


def wkd_feature_loss(
    student_features: jax.Array,
    teacher_features: jax.Array,
    *,
    grid: int = 1,
    mean_cov_ratio: float = 2.0,
    epsilon: float = 1e-5,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the Wasserstein distance of Gaussians with diagonal covariance over the positions in windows of maps.

    The loss is ratio * mean + std, with mean = 1/g^2 sum over windows and channels of (mu^s - mu^t)^2 and std the same
    for the deviations sqrt(v + epsilon), where mu and v are the mean and the unbiased variance over the positions of a
    window. Time and memory are O(B H W D).

    Args:
      student_features: Maps of the student, mapped to the teacher's channels, float [B, H, W, D].
      teacher_features: Maps of the teacher, float, in the shape of student_features, never differentiated.
      grid: Number g of windows along each axis. They are the windows of adaptive pooling, which overlap where g does
        not divide the size.
      mean_cov_ratio: Weight of the means.
      epsilon: Number added to the variances, greater than 0.

    Returns:
      A scalar and the unweighted terms `mean` and `std`, of at least float32: means over the local batch. The variance
      of a window of one position counts as 0, where the authors' code gives NaN.

    Raises:
      TypeError: If the features are not floating point.
      ValueError: If the features do not have 4 dimensions, if shapes differ, if grid is less than 1, or if epsilon is
        not positive.

    References:
      Lv, Yang, Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation", NeurIPS 2024,
      https://arxiv.org/abs/2412.08139; code: https://github.com/JiamingLv/WKD.
    """
    check_float("student_features", student_features, ndim=4)
    check_float("teacher_features", teacher_features, ndim=4)
    check_same_shape(student_features=student_features, teacher_features=teacher_features)
    if grid < 1:
        raise ValueError(f"grid must be at least 1, got {grid}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be greater than 0, got {epsilon}")
    student, teacher = at_least_float32(student_features), lax.stop_gradient(at_least_float32(teacher_features))
    terms = {"mean": jnp.zeros((), student.dtype), "std": jnp.zeros((), student.dtype)}
    for rows in cells(student.shape[1], grid):
        for columns in cells(student.shape[2], grid):
            of_student = _moments(student[:, rows, columns], epsilon)
            of_teacher = _moments(teacher[:, rows, columns], epsilon)
            for name, s, t in zip(terms, of_student, of_teacher, strict=True):
                terms[name] += jnp.mean(jnp.sum(jnp.square(s - t), axis=1)) / grid**2
    return mean_cov_ratio * terms["mean"] + terms["std"], terms


def _moments(window, epsilon):
    """Returns the mean and the deviation of each channel: [B, H, W, D] -> two arrays [B, D]."""
    mean = jnp.mean(window, axis=(1, 2), keepdims=True)
    positions = window.shape[1] * window.shape[2]
    variance = jnp.sum(jnp.square(window - mean), axis=(1, 2)) / max(positions - 1, 1)
    return mean[:, 0, 0], jnp.sqrt(variance + epsilon)


class WKDFeature(Method):
    """Applies `wkd_feature_loss` to the last stages, through a trained projector with batch normalization and ReLU.

    Where maps differ in size, the larger is average-pooled to the smaller first.

    Attributes:
      projector: Layers of the projector: "bottleneck" has a 1x1, a 3x3 and a 1x1 convolution, "conv1x1" a single one,
        all with biases.
      hidden: Number of channels inside the bottleneck.
      grid: Number of windows along each axis.
      mean_cov_ratio: Weight of the means; the authors use 4 for CIFAR-100.
      epsilon: Number added to the variances.
    """

    projector: Literal["bottleneck", "conv1x1"] = "bottleneck"
    hidden: Count = 256
    grid: Count = 4
    mean_cov_ratio: float = 2.0
    epsilon: Positive = 1e-5

    @nn.compact
    def __call__(self, inputs: LossInputs):
        x, teacher = inputs.student.stages[-1], inputs.teacher.stages[-1]
        check_float("the last stage of the student", x, ndim=4)
        check_float("the last stage of the teacher", teacher, ndim=4)
        x, teacher = pool_to_common_size(x, teacher)
        layers = [(teacher.shape[-1], 1)]
        if self.projector == "bottleneck":
            layers = [(self.hidden, 1), (self.hidden, 3), *layers]
        for number, (features, size) in enumerate(layers, start=1):
            x = Convolution(features, size, use_bias=True, name=f"convolution{number}")(x)
        x = nn.relu(Normalization(self.axis_name, name="normalization")(x))
        return wkd_feature_loss(x, teacher, grid=self.grid, mean_cov_ratio=self.mean_cov_ratio, epsilon=self.epsilon)
