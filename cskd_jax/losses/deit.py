"""The distillation token: a Vision Transformer learns the teacher's prediction through a separate token and head."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._checks import check_logits
from cskd_jax.losses.base import LossInputs, Method, Positive
from cskd_jax.losses.logits import cross_entropy_loss, kd_loss


def hard_distillation_loss(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Computes the cross-entropy of the student with the class that the teacher predicts: -ln p_c, c = argmax z^t.

    Args:
      student_logits: Logits of the student, float [B, C].
      teacher_logits: Logits of the teacher, float [B, C], never differentiated. Among equal logits, the first counts.

    Returns:
      A scalar of at least float32: the mean over the batch.

    Raises:
      TypeError: If the logits are not floating point.
      ValueError: If shapes differ.

    References:
      Touvron, Cord, Douze, Massa, Sablayrolles, Jegou, "Training Data-Efficient Image Transformers & Distillation
      Through Attention", ICML 2021, Eq. 3, https://arxiv.org/abs/2012.12877.
    """
    check_logits(student_logits, teacher_logits)
    predicted = jnp.argmax(lax.stop_gradient(teacher_logits), axis=1)
    return cross_entropy_loss(student_logits, predicted)


class DistillationToken(Method):
    """Distills into the head of the distillation token, as DeiT does (Touvron et al. 2021).

    The hard form is `hard_distillation_loss`. The soft form is T^2 KL(softmax(z^t / T) || softmax(z^s / T)), which the
    authors' code averages over all B C elements: it is `kd_loss` divided by the number of classes.

    Attributes:
      hard: Whether the target is the class that the teacher predicts, rather than its distribution.
      temperature: Temperature of the softmax in the soft form, greater than 0.
    """

    hard: bool = True
    temperature: Positive = 1.0
    softmax: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs):
        heads, teacher_logits = inputs.student.head_logits, inputs.teacher.logits
        if len(heads) < 2:
            raise ValueError(
                "deit distills into the head of a distillation token, which the student does not have: use a Vision "
                "Transformer with distillation_token=True"
            )
        if self.hard:
            return hard_distillation_loss(heads[1], teacher_logits), {}
        return kd_loss(heads[1], teacher_logits, temperature=self.temperature) / heads[1].shape[1], {}
