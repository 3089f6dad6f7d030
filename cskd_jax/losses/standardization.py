"""Knowledge distillation of standardized logits: relations between categories without their size."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._arrays import normalize
from cskd_jax.losses._checks import at_least_float32, check_logits
from cskd_jax.losses.base import LossInputs, Method, Positive
from cskd_jax.losses.logits import kd_loss


def standardized_kd_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 2.0
) -> jax.Array:
    """Knowledge distillation of logits scaled to mean 0 and standard deviation 1 over the categories of a sample.

    T^2 KL(softmax(n(z^t) / T) || softmax(n(z^s) / T)), with n(z) = (z - mean z) / std z: the student is asked for the
    order and the spacing of the teacher's logits, not for their size. Time and memory O(B C).

    Args:
      student_logits: float [B, C], C >= 2.
      teacher_logits: float [B, C]. Never differentiated.
      temperature: T > 0.

    Returns:
      Scalar, mean over the batch of the sum over categories, at least float32. Logits that are all equal stay 0, with
      zero gradient.

    Raises:
      TypeError: logits are not floating point.
      ValueError: shapes that do not fit, fewer than 2 categories, or a temperature that is not positive.

    References:
      Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024,
      https://arxiv.org/abs/2403.01993, with the deviation over all C categories (their code divides by C - 1).
    """
    check_logits(student_logits, teacher_logits)
    if student_logits.shape[1] < 2:
        raise ValueError(f"standardized_kd_loss needs at least 2 categories, got {student_logits.shape[1]}")
    return kd_loss(
        _standardize(student_logits), lax.stop_gradient(_standardize(teacher_logits)), temperature=temperature
    )


def _standardize(logits):
    logits = at_least_float32(logits)
    return normalize(logits - jnp.mean(logits, axis=1, keepdims=True)) * math.sqrt(logits.shape[1])


class StandardizedKD(Method):
    """`standardized_kd_loss` on the logits.

    Attributes:
      temperature: Temperature of the softmax, greater than 0.
    """

    temperature: Positive = 2.0

    def __call__(self, inputs: LossInputs):
        student, teacher = inputs.student.logits, inputs.teacher.logits
        return standardized_kd_loss(student, teacher, temperature=self.temperature), {}
