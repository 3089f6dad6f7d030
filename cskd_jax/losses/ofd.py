"""Overhauled feature distillation: pre-activations of the teacher above a margin that its normalization determines."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.scipy import special

from cskd_jax.losses._arrays import average_pool
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_shape, pair_stages
from cskd_jax.losses._connectors import Connector
from cskd_jax.losses.base import Count, LossInputs, Method, Norm

# Where a normalized channel is below zero less often than this, its margin is a multiple of its scale.
_RARE, _MULTIPLE = 0.001, -3
# The initializer of the authors' code: the deviation is the square root of 2 / (kernel_size^2 output channels).
_kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def ofd_margin(norm: Norm) -> jax.Array:
    """Computes the margin of each channel after a batch normalization.

    A channel is assumed to be normally distributed, with the offset as mean m and the absolute scale as deviation s.
    The margin is the mean of its negative values, m - s exp(-(m / s)^2 / 2) / (sqrt(2 pi) Phi(-m / s)), but -3 s if the
    probability of a negative value, Phi(-m / s), is at most 0.001.

    Args:
      norm: Scale and offset of the normalization, float [D], never differentiated.

    Returns:
      The margins, at most 0, [D], of at least float32. For a channel with scale 0, the margin is the offset if it is
      negative, and otherwise 0.
    """
    mean, deviation = at_least_float32(norm.bias), jnp.abs(at_least_float32(norm.scale))
    moves = deviation > 0
    ratio = mean / jnp.where(moves, deviation, 1)
    below_zero = special.erfc(ratio / jnp.sqrt(2).astype(ratio.dtype)) / 2
    density = jnp.exp(-jnp.square(ratio) / 2) / jnp.sqrt(2 * jnp.pi).astype(ratio.dtype)
    conditional = mean - deviation * density / jnp.maximum(below_zero, _RARE)
    margin = jnp.where(below_zero > _RARE, conditional, _MULTIPLE * deviation)
    return lax.stop_gradient(jnp.where(moves, margin, jnp.minimum(mean, 0)))


def ofd_loss(
    student_stages: Sequence[jax.Array], teacher_stages: Sequence[jax.Array], margins: Sequence[jax.Array]
) -> jax.Array:
    """Computes overhauled feature distillation on pre-activations.

    The loss is the sum over stages l = 1..L of 2^(l - L) / B sum of d(x, y), with x from the student and y from the
    teacher: d is (x - y)^2 where y > 0; where y <= 0, it is (x - max(y, m))^2 if x is above max(y, m), and otherwise 0.
    Here m is the margin of the channel. Time and memory are O(B H W D) per stage.

    Args:
      student_stages: Pre-activations of the student, float [B, H_l, W_l, D_l], mapped to the teacher's channels.
      teacher_stages: Pre-activations of the teacher in the same shapes, never differentiated.
      margins: Margin of each channel, float [D_l] (see `ofd_margin`).

    Returns:
      A scalar of at least float32: the mean over the batch (B is the batch size of the arrays) of sums over the
      elements.

    Raises:
      TypeError: If a stage is not floating point.
      ValueError: If the numbers of stages or the shapes differ.

    References:
      Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation", ICCV 2019,
      https://arxiv.org/abs/1904.01866.
    """
    pairs = pair_stages(student_stages, teacher_stages)
    if len(margins) != len(pairs):
        raise ValueError(f"{len(pairs)} stages need the same number of margins, got {len(margins)}")
    total = 0.0
    for stage, ((student, teacher), margin) in enumerate(zip(pairs, margins, strict=True), start=1):
        check_float(f"student stage {stage}", student, ndim=4)
        check_float(f"teacher stage {stage}", teacher, ndim=4)
        check_same_shape(student=student, teacher=teacher)
        student, teacher = at_least_float32(student), lax.stop_gradient(at_least_float32(teacher))
        target = jnp.maximum(teacher, margin)
        below = (teacher <= 0) & (student <= target)
        squares = jnp.where(below, 0, jnp.square(student - target))
        total += 2.0 ** (stage - len(pairs)) * jnp.sum(squares) / len(student)
    return jnp.asarray(total)


class OFD(Method):
    """Applies `ofd_loss` to the pre-activations of all stages, through trained connectors.

    A connector is a convolution with batch normalization to the teacher's channels. The teacher's map is average-pooled
    to the size of the student's, or enlarged to it by repetition. The margins come from the scale and the offset of the
    teacher's batch normalization before the last ReLU of each stage, which are not trained; the teacher is in
    evaluation mode.

    Attributes:
      kernel_size: Side of the kernel of the connectors, an odd number.
    """

    kernel_size: Count = 1

    @nn.compact
    def __call__(self, inputs: LossInputs):
        if self.kernel_size % 2 == 0:
            raise ValueError(f"ofd: kernel_size must be odd, got {self.kernel_size}")
        students, teachers = [], []
        pairs = pair_stages(inputs.student.preactivations, inputs.teacher.preactivations)
        for stage, (student, teacher) in enumerate(pairs, start=1):
            connector = Connector(
                teacher.shape[-1], self.kernel_size, self.axis_name, _kernel_init, name=f"connector{stage}"
            )
            students.append(connector(student))
            teachers.append(average_pool(at_least_float32(teacher), (student.shape[1], student.shape[2])))
        return ofd_loss(students, teachers, [ofd_margin(norm) for norm in inputs.teacher_norms]), {}
