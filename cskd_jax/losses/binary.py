"""Losses on the logits of multi-label networks, in which every class is a separate yes-or-no question."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._checks import at_least_float32, check_float, check_logits, check_multilabels, check_temperature
from cskd_jax.losses.base import LossInputs, Method, Positive


def binary_cross_entropy_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the cross-entropy of sigmoid(logits): -y ln p - (1 - y) ln(1 - p).

    Args:
      logits: Logits, float [B, C].
      labels: Labels, float or bool [B, C], in [0, 1] (not checked).

    Returns:
      A scalar of at least float32: the mean over all B C elements.

    Raises:
      TypeError: If the logits are not floating point, or the labels are neither floating point nor bool.
      ValueError: If shapes do not fit.
    """
    check_float("logits", logits, ndim=2)
    check_multilabels(labels, *logits.shape)
    logits = at_least_float32(logits)
    labels = labels.astype(logits.dtype)
    return -jnp.mean(labels * jax.nn.log_sigmoid(logits) + (1 - labels) * jax.nn.log_sigmoid(-logits))


def binary_kd_loss(student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 4.0) -> jax.Array:
    """Computes distillation of multi-label logits: T^2 sum_c KL(Bernoulli(p^t_c) || Bernoulli(p^s_c)).

    Here p = sigmoid(z / T). The loss is the counterpart of `kd_loss`, and equals it where `kd_loss` has two classes
    with the logits z and 0.

    Args:
      student_logits: Logits of the student, float [B, C].
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.
      temperature: Temperature T, greater than 0.

    Returns:
      A scalar of at least float32: the mean over the batch of the sum over classes.

    Raises:
      TypeError: If the logits are not floating point.
      ValueError: If shapes differ, or if the temperature is not positive.

    References:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531, for
      one class per sample.
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    student = at_least_float32(student_logits) / temperature
    teacher = lax.stop_gradient(at_least_float32(teacher_logits)) / temperature
    divergence = 0.0
    for sign in (1, -1):  # yes and no
        log_s, log_t = jax.nn.log_sigmoid(sign * student), jax.nn.log_sigmoid(sign * teacher)
        divergence += jnp.exp(log_t) * (log_t - log_s)
    return temperature**2 * jnp.mean(jnp.sum(divergence, axis=1))


class BinaryCrossEntropy(Method):
    """Applies `binary_cross_entropy_loss` to the student's logits and the labels."""

    needs_teacher: ClassVar[bool] = False
    supervises: ClassVar[bool] = True
    multilabel: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs):
        return binary_cross_entropy_loss(inputs.student.logits, inputs.labels), {}


class BinaryKD(Method):
    """Applies `binary_kd_loss` to the logits.

    Attributes:
      temperature: Temperature of the sigmoid, greater than 0.
    """

    temperature: Positive = 4.0
    multilabel: ClassVar[bool] = True
    baseline: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs):
        return binary_kd_loss(inputs.student.logits, inputs.teacher.logits, temperature=self.temperature), {}
