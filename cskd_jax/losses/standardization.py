"""Knowledge distillation of standardized logits: the student learns relations between classes without their scale."""

from typing import ClassVar

import jax

from cskd_jax.losses._checks import check_logits
from cskd_jax.losses._logits import read_logits, standardize_logits
from cskd_jax.losses.base import LossInputs, Method, Positive
from cskd_jax.losses.logits import kd_loss


def standardized_kd_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 2.0
) -> jax.Array:
    """Computes `kd_loss` of logits standardized by `standardize_logits`.

    The loss is T^2 KL(softmax(n(z^t) / T) || softmax(n(z^s) / T)). The student learns the order and the spacing of the
    teacher's logits, not their scale. Time and memory are O(B C).

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
    student, teacher = standardize_logits(student_logits), standardize_logits(teacher_logits)
    return kd_loss(student, teacher, temperature=temperature)


class StandardizedKD(Method):
    """Applies `kd_loss` to standardized logits: `KD` with `standardize`, under its published name.

    Attributes:
      temperature: Temperature of the softmax, greater than 0.
    """

    temperature: Positive = 2.0
    softmax: ClassVar[bool] = True
    version: ClassVar[int] = 2

    def __call__(self, inputs: LossInputs):
        return kd_loss(*read_logits(inputs, standardize=True), temperature=self.temperature), {}
