"""DIST: the student learns the correlations of the predictions, within a sample and within a class."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._arrays import rounding_of_mean, safe_sqrt
from cskd_jax.losses._batch import gather_batch
from cskd_jax.losses._checks import (
    at_least_float32,
    check_float,
    check_logits,
    check_same_shape,
    check_several_samples,
    check_temperature,
)
from cskd_jax.losses.base import LossInputs, Method, Positive

# This number is added to the product of two norms, as in the authors' code.
_EPSILON = 1e-8


def dist_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 4.0,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes DIST: T^2 (beta * inter + gamma * intra), for predictions Y = softmax(z / T) of shape [B, C].

    inter = 1 - mean over the samples i of pearson(Y^s_i:, Y^t_i:), which relates the classes of a sample. intra = 1 -
    mean over the classes c of pearson(Y^s_:c, Y^t_:c), which relates the samples of the global batch. As in the
    authors' code (https://github.com/hunto/DIST_KD), pearson(a, b) = <a, b> / (|a| |b| + 1e-8) for rows with their
    means removed.

    Time and memory are O(B C), on every device.

    Args:
      student_logits: Logits of the student, float [B, C].
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.
      beta: Weight of inter. The defaults of beta and gamma are those of the authors' code.
      gamma: Weight of intra.
      temperature: Temperature T, greater than 0. The default is the authors' value for small images (CIFAR-100); on
        ImageNet they use 1.
      axis_name: Name of the mapped axis (`jax.pmap`) over which the batch is split, static. Inter is then the mean over
        the local samples; for intra the predictions of the global batch are gathered, so its value is the same on every
        device.

    Returns:
      A scalar and the terms `inter` and `intra` without their weights and T^2, each in [0, 2], of at least float32. A
      row or column whose entries are all equal has correlation 0 with every other, and zero gradient.

    Raises:
      TypeError: If the logits are not floating point.
      ValueError: If shapes do not fit, if there are fewer than 2 classes, if the global batch has one sample, or if the
        temperature is not positive.

    References:
      Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022,
      https://arxiv.org/abs/2205.10536, section 3.
    """
    check_logits(student_logits, teacher_logits)
    if student_logits.shape[1] < 2:
        raise ValueError(f"dist_loss correlates classes: it needs at least 2, got {student_logits.shape[1]}")
    check_temperature(temperature)
    student = jax.nn.softmax(at_least_float32(student_logits) / temperature)
    teacher = lax.stop_gradient(jax.nn.softmax(at_least_float32(teacher_logits) / temperature))
    inter = 1 - jnp.mean(_pearson(student, teacher))
    student, teacher = gather_batch(student, axis_name), gather_batch(teacher, axis_name)
    check_several_samples("dist_loss", len(student))
    intra = 1 - jnp.mean(_pearson(student.T, teacher.T))
    return temperature**2 * (beta * inter + gamma * intra), {"inter": inter, "intra": intra}


def dense_dist_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes `dist_loss` of dense predictions, as in segmentation: every position counts as a sample.

    The temperature is 1, as in the authors' code for segmentation. The remaining arguments, the return values and the
    errors are as for `dist_loss`.

    Args:
      student_logits: Logits of the student, float [B, H, W, C].
      teacher_logits: Logits of the teacher, float [B, H, W, C], never differentiated.
      beta: Weight of inter.
      gamma: Weight of intra.
      axis_name: Name of the mapped axis. For intra the predictions of the global batch are gathered.

    Returns:
      A scalar and the terms `inter` and `intra`.
    """
    check_float("student_logits", student_logits, ndim=4)
    check_float("teacher_logits", teacher_logits, ndim=4)
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    student, teacher = (x.reshape(-1, x.shape[-1]) for x in (student_logits, teacher_logits))
    return dist_loss(student, teacher, beta=beta, gamma=gamma, temperature=1.0, axis_name=axis_name)


def _pearson(a, b):
    """Returns the correlation of each row of `a` with the same row of `b`: [R, N], [R, N] -> [R]."""
    rounding = [rounding_of_mean(jnp.sum(jnp.square(x), axis=1)) for x in (a, b)]
    a, b = (x - jnp.mean(x, axis=1, keepdims=True) for x in (a, b))
    norms = [safe_sqrt(jnp.sum(jnp.square(x), axis=1), least) for x, least in zip((a, b), rounding, strict=True)]
    constant = (norms[0] == 0) | (norms[1] == 0)
    product = jnp.where(constant, 0, jnp.sum(a * b, axis=1))
    return product / (norms[0] * norms[1] + _EPSILON)


class DIST(Method):
    """Applies `dist_loss` to the logits.

    Attributes:
      beta: Weight of the relations between the classes of a sample.
      gamma: Weight of the relations between the samples of a class.
      temperature: Temperature of the softmax, greater than 0.
    """

    beta: float = 1.0
    gamma: float = 1.0
    temperature: Positive = 4.0
    softmax: ClassVar[bool] = True
    version: ClassVar[int] = 2

    def __call__(self, inputs: LossInputs):
        return dist_loss(
            inputs.student.logits,
            inputs.teacher.logits,
            beta=self.beta,
            gamma=self.gamma,
            temperature=self.temperature,
            axis_name=self.axis_name,
        )
