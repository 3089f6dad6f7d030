"""Losses on the logits of multi-label networks, whose categories are so many yes-or-no questions."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._checks import at_least_float32, check_float, check_logits, check_multilabels, check_temperature
from cskd_jax.losses.base import LossInputs, Method, Positive


def binary_cross_entropy_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of sigmoid(logits): -y ln p - (1 - y) ln(1 - p).

    Args:
      logits: float [B, C].
      labels: float or bool [B, C], in [0, 1] (not checked).

    Returns:
      Scalar, mean over all B C elements, at least float32.

    Raises:
      TypeError: logits are not floating point, labels neither that nor bool.
      ValueError: shapes that do not fit.
    """
    check_float("logits", logits, ndim=2)
    check_multilabels(labels, *logits.shape)
    logits = at_least_float32(logits)
    labels = labels.astype(logits.dtype)
    return -jnp.mean(labels * jax.nn.log_sigmoid(logits) + (1 - labels) * jax.nn.log_sigmoid(-logits))


def binary_kd_loss(student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float = 4.0) -> jax.Array:
    """Knowledge distillation of multi-label logits: T^2 sum_c KL(Bernoulli(p^t_c) || Bernoulli(p^s_c)).

    p = sigmoid(z / T). The counterpart of `kd_loss`, and equal to it where that has two categories with the logits z
    and 0.

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
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531, for
      one category per sample.
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
    """`binary_cross_entropy_loss` of the student with the labels."""

    needs_teacher: ClassVar[bool] = False
    multilabel: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs):
        return binary_cross_entropy_loss(inputs.student.logits, inputs.labels), {}


class BinaryKD(Method):
    """`binary_kd_loss` on the logits.

    Attributes:
      temperature: Temperature of the sigmoid, greater than 0.
    """

    temperature: Positive = 4.0
    multilabel: ClassVar[bool] = True
    baseline: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs):
        return binary_kd_loss(inputs.student.logits, inputs.teacher.logits, temperature=self.temperature), {}
