"""Knowledge distillation of standardized logits: the student learns relations between classes without their size."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._arrays import safe_sqrt
from cskd_jax.losses._checks import at_least_float32, check_logits
from cskd_jax.losses.base import LossInputs, Method, Positive
from cskd_jax.losses.logits import kd_loss

# This number is added to the standard deviation, as in the authors' code.
_EPSILON = 1e-7
# Sums of squares up to this count as zero, with zero gradient.
_NEGLIGIBLE = 1e-24


def standardized_kd_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 2.0
) -> jax.Array:
    """Computes distillation of logits scaled to mean 0 and standard deviation 1 over the classes of a sample.

    The loss is T^2 KL(softmax(n(z^t) / T) || softmax(n(z^s) / T)), with n(z) = (z - mean z) / (std z + 1e-7), where the
    sum of squares in std is divided by C - 1. The student learns the order and the spacing of the teacher's logits, not
    their size. Time and memory are O(B C).

    Args:
      student_logits: Logits of the student, float [B, C], with C >= 2.
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.
      temperature: Temperature T, greater than 0.

    Returns:
      A scalar of at least float32: the mean over the batch of the sum over classes. Logits that are all equal stay 0,
      with zero gradient.

    Raises:
      TypeError: If the logits are not floating point.
      ValueError: If shapes do not fit, if there are fewer than 2 classes, or if the temperature is not positive.

    References:
      Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024,
      https://arxiv.org/abs/2403.01993; code: https://github.com/sunshangquan/logit-standardization-KD.
    """
    check_logits(student_logits, teacher_logits)
    if student_logits.shape[1] < 2:
        raise ValueError(f"standardized_kd_loss needs at least 2 classes, got {student_logits.shape[1]}")
    return kd_loss(
        _standardize(student_logits), lax.stop_gradient(_standardize(teacher_logits)), temperature=temperature
    )


def _standardize(logits):
    logits = at_least_float32(logits)
    centered = logits - jnp.mean(logits, axis=1, keepdims=True)
    squares = jnp.sum(jnp.square(centered), axis=1, keepdims=True)
    deviation = safe_sqrt(squares / (logits.shape[1] - 1), _NEGLIGIBLE)
    return jnp.where(deviation > 0, centered, 0) / (deviation + _EPSILON)


class StandardizedKD(Method):
    """Applies `standardized_kd_loss` to the logits.

    Attributes:
      temperature: Temperature of the softmax, greater than 0.
    """

    temperature: Positive = 2.0
    version: ClassVar[int] = 2

    def __call__(self, inputs: LossInputs):
        student, teacher = inputs.student.logits, inputs.teacher.logits
        return standardized_kd_loss(student, teacher, temperature=self.temperature), {}
