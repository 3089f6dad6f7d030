"""Transformed teacher matching: a power of the teacher's distribution, and a student without a temperature."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._checks import at_least_float32, check_logits
from cskd_jax.losses.base import LossInputs, Method, Positive


def ttm_loss(student_logits: jax.Array, teacher_logits: jax.Array, *, exponent: float = 0.1) -> jax.Array:
    """Computes transformed teacher matching: KL(q || softmax(z^s)) with q = softmax(exponent z^t).

    The exponent, gamma in the paper, is the inverse of a temperature: q is the distribution of the teacher with every
    probability raised to that power. The student has no temperature. Time and memory are O(B C).

    Args:
      student_logits: Logits of the student, float [B, C].
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.
      exponent: Exponent of the teacher's probabilities, greater than 0; 1 leaves them unchanged.

    Returns:
      A scalar of at least float32: the mean over the batch of the sum over classes.

    Raises:
      TypeError: If the logits are not floating point.
      ValueError: If shapes differ, or if the exponent is not positive.

    References:
      Zheng, Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024,
      https://arxiv.org/abs/2402.11148; code: https://github.com/zkxufo/TTM.
    """
    return jnp.mean(_divergences(student_logits, teacher_logits, exponent)[0])


def wttm_loss(student_logits: jax.Array, teacher_logits: jax.Array, *, exponent: float = 0.2) -> jax.Array:
    """Computes weighted transformed teacher matching: U KL(q || softmax(z^s)), with the q of `ttm_loss`.

    The weight of a sample is U = sum over c of softmax(z^t)_c^exponent, which is large where the teacher is uncertain.

    The arguments, the return value and the errors are as for `ttm_loss`.
    """
    divergences, log_sums = _divergences(student_logits, teacher_logits, exponent)
    return jnp.mean(jnp.exp(log_sums) * divergences)


def _divergences(student_logits, teacher_logits, exponent):
    """Returns KL(q || p^s) [B] and ln U [B]."""
    check_logits(student_logits, teacher_logits)
    if not exponent > 0:
        raise ValueError(f"exponent must be greater than 0, got {exponent}")
    log_s = jax.nn.log_softmax(at_least_float32(student_logits))
    powers = exponent * jax.nn.log_softmax(lax.stop_gradient(at_least_float32(teacher_logits)))
    log_sums = jax.nn.logsumexp(powers, axis=1)
    log_q = powers - log_sums[:, None]
    return jnp.sum(jnp.exp(log_q) * (log_q - log_s), axis=1), log_sums


class TTM(Method):
    """Applies `ttm_loss` to the logits.

    Attributes:
      exponent: Exponent of the teacher's probabilities, the inverse of a temperature, greater than 0.
    """

    exponent: Positive = 0.1
    softmax: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs):
        return ttm_loss(inputs.student.logits, inputs.teacher.logits, exponent=self.exponent), {}


class WTTM(Method):
    """Applies `wttm_loss` to the logits.

    Attributes:
      exponent: Exponent of the teacher's probabilities, the inverse of a temperature, greater than 0.
    """

    exponent: Positive = 0.2
    softmax: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs):
        return wttm_loss(inputs.student.logits, inputs.teacher.logits, exponent=self.exponent), {}
