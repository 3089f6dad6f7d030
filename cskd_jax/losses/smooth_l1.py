"""Smooth L1 loss between logits (Girshick, Fast R-CNN, 2015, equation 3)."""

import jax
import jax.numpy as jnp

from cskd_jax.losses.base import LossInputs, Method


def smooth_l1_loss(student_logits: jax.Array, teacher_logits: jax.Array, *, beta: float = 1.0) -> jax.Array:
    """Returns the mean over samples and classes of d^2 / (2 beta) where |d| < beta, and of |d| - beta / 2 elsewhere.

    Args:
      student_logits: float [B, C].
      teacher_logits: float [B, C].
      beta: Distance at which the loss becomes linear, greater than 0.
    """
    distance = jnp.abs(student_logits - teacher_logits)
    return jnp.mean(jnp.where(distance < beta, distance**2 / (2 * beta), distance - beta / 2))


class SmoothL1(Method):
    """`smooth_l1_loss` on the logits.

    Attributes:
      beta: Distance at which the loss becomes linear, greater than 0.
    """

    beta: float = 1.0

    def __call__(self, inputs: LossInputs):
        return smooth_l1_loss(inputs.student.logits, inputs.teacher.logits, beta=self.beta), {}
