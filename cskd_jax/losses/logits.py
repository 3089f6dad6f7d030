"""Losses on logits: cross-entropy, knowledge distillation with a temperature, mean squared error."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._checks import at_least_float32, check_float, check_labels, check_logits, check_temperature
from cskd_jax.losses.base import LossInputs, Method, Positive


def cross_entropy_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of softmax(logits) with integer labels.

    Args:
      logits: float [B, C].
      labels: int [B], in [0, C).

    Returns:
      Scalar, mean over the batch, at least float32.

    Raises:
      TypeError: logits are not floating point or labels not integer.
      ValueError: shapes that do not fit.
    """
    check_float("logits", logits, ndim=2)
    check_labels(labels, logits.shape[0])
    log_probabilities = jax.nn.log_softmax(at_least_float32(logits))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))


def kd_loss(student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 4.0) -> jax.Array:
    """Knowledge distillation: T^2 KL(softmax(z^t / T) || softmax(z^s / T)).

    Args:
      student_logits: float [B, C].
      teacher_logits: float [B, C]. Never differentiated.
      temperature: T > 0.

    Returns:
      Scalar, mean over the batch of the sum over categories, at least float32.

    Raises:
      TypeError: logits are not floating point.
      ValueError: shapes that differ, or a temperature that is not positive.

    References:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531.
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    log_s = jax.nn.log_softmax(at_least_float32(student_logits) / temperature)
    log_t = jax.nn.log_softmax(lax.stop_gradient(at_least_float32(teacher_logits)) / temperature)
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=1))


def mse_logits_loss(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Mean squared error between the logits of student and teacher (Chen et al. 2020, Eq. 10).

    Args:
      student_logits: float [B, C].
      teacher_logits: float [B, C]. Never differentiated.

    Returns:
      Scalar, mean over all B C elements, at least float32.

    Raises:
      TypeError: logits are not floating point.
      ValueError: shapes that differ.
    """
    check_logits(student_logits, teacher_logits)
    return jnp.mean(jnp.square(at_least_float32(student_logits) - lax.stop_gradient(at_least_float32(teacher_logits))))


class CrossEntropy(Method):
    """`cross_entropy_loss` of the student with the labels."""

    needs_teacher: ClassVar[bool] = False
    multilabel: ClassVar[bool] = False

    def __call__(self, inputs: LossInputs):
        return cross_entropy_loss(inputs.student.logits, inputs.labels), {}


class KD(Method):
    """`kd_loss` on the logits.

    Attributes:
      temperature: Temperature of the softmax, greater than 0.
    """

    temperature: Positive = 4.0
    baseline: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs):
        return kd_loss(inputs.student.logits, inputs.teacher.logits, temperature=self.temperature), {}


class MSELogits(Method):
    """`mse_logits_loss` on the logits."""

    def __call__(self, inputs: LossInputs):
        return mse_logits_loss(inputs.student.logits, inputs.teacher.logits), {}
