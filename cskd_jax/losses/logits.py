"""Losses on logits: cross-entropy, knowledge distillation with a temperature, and mean squared error."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._checks import at_least_float32, check_float, check_labels, check_logits, check_temperature
from cskd_jax.losses._logits import read_logits
from cskd_jax.losses.base import Fraction, LossInputs, Method, Positive


def cross_entropy_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    label_smoothing: float = 0.0,
    other_labels: jax.Array | None = None,
    share: jax.Array | None = None,
) -> jax.Array:
    """Computes the cross-entropy of softmax(logits) with integer labels.

    With label smoothing e, the target is 1 - e at the label plus e / C at every class (Szegedy et al. 2016).

    Args:
      logits: Logits, float [B, C].
      labels: Labels, int [B], in [0, C).
      label_smoothing: Share e of the uniform distribution in the target, in [0, 1).
      other_labels: Labels of the images that the batch's images are mixed with, int [B]; None if they are not mixed.
      share: Share of `labels` in the target, float [B], in [0, 1]; the rest goes to `other_labels`, with which it is
        given.

    Returns:
      A scalar of at least float32: the mean over the batch.

    Raises:
      TypeError: If the logits are not floating point, or the labels not integers.
      ValueError: If shapes do not fit, if only one of other_labels and share is given, or if the label smoothing is out
        of range.
    """
    check_float("logits", logits, ndim=2)
    check_labels(labels, logits.shape[0])
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if (other_labels is None) != (share is None):
        raise ValueError("other_labels and share must be given together")
    log_probabilities = jax.nn.log_softmax(at_least_float32(logits))

    def of(labels):
        return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)

    if other_labels is None or share is None:
        value = jnp.mean(of(labels))
    else:
        check_labels(other_labels, logits.shape[0])
        share = share.astype(log_probabilities.dtype)[:, None]
        value = jnp.mean(share * of(labels) + (1 - share) * of(other_labels))
    if not label_smoothing:
        return value
    return (1 - label_smoothing) * value - label_smoothing * jnp.mean(log_probabilities)


def kd_loss(student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float | jax.Array = 4.0) -> jax.Array:
    """Computes knowledge distillation: T^2 KL(softmax(z^t / T) || softmax(z^s / T)).

    Args:
      student_logits: Logits of the student, float [B, C].
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.
      temperature: Temperature T, greater than 0 and finite; it may be an array, which may be differentiated. A traced
        one is not checked.

    Returns:
      A scalar of at least float32: the mean over the batch of the sum over classes.

    Raises:
      TypeError: If the logits are not floating point.
      ValueError: If shapes differ, or if the temperature is not positive or not finite.

    References:
      Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, https://arxiv.org/abs/1503.02531.
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    log_s = jax.nn.log_softmax(at_least_float32(student_logits) / temperature)
    log_t = jax.nn.log_softmax(lax.stop_gradient(at_least_float32(teacher_logits)) / temperature)
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=1))


def mse_logits_loss(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Computes the mean squared error between the logits of student and teacher (Chen et al. 2020, Eq. 10).

    Args:
      student_logits: Logits of the student, float [B, C].
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.

    Returns:
      A scalar of at least float32: the mean over all B C elements.

    Raises:
      TypeError: If the logits are not floating point.
      ValueError: If shapes differ.
    """
    check_logits(student_logits, teacher_logits)
    return jnp.mean(jnp.square(at_least_float32(student_logits) - lax.stop_gradient(at_least_float32(teacher_logits))))


def supervise(logits: jax.Array, inputs: LossInputs, *, label_smoothing: float = 0.0) -> jax.Array:
    """Returns `cross_entropy_loss` of logits with the labels of a batch, or with both labels where images are mixed."""
    target = {} if inputs.mixed is None else {"other_labels": inputs.mixed.labels, "share": inputs.mixed.share}
    return cross_entropy_loss(logits, inputs.labels, label_smoothing=label_smoothing, **target)


class CrossEntropy(Method):
    """Applies `cross_entropy_loss` to the student's logits and the labels.

    Attributes:
      all_views: Whether the further views of the images, which some methods require, are also supervised; their
        cross-entropies are then added.
      first_head: Whether only the first of several heads, that of the class token, is supervised instead of the mean of
        all heads.
      label_smoothing: Share of the uniform distribution in the target, in [0, 1).
    """

    all_views: bool = False
    first_head: bool = False
    label_smoothing: Fraction = 0.0
    needs_teacher: ClassVar[bool] = False
    supervises: ClassVar[bool] = True
    multilabel: ClassVar[bool] = False
    mixes: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs):
        value = self._of(inputs.student, inputs)
        for view in inputs.views if self.all_views else ():
            value += self._of(view.student, inputs)
        return value, {}

    def _of(self, student, inputs):
        logits = student.head_logits[0] if self.first_head and student.head_logits else student.logits
        return supervise(logits, inputs, label_smoothing=self.label_smoothing)


class KD(Method):
    """Applies `kd_loss` to the logits.

    Attributes:
      temperature: Temperature of the softmax, greater than 0.
      standardize: Whether the logits of every sample are first scaled to mean 0 and standard deviation 1.
    """

    temperature: Positive = 4.0
    standardize: bool = False
    softmax: ClassVar[bool] = True
    baseline: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs):
        return kd_loss(*read_logits(inputs, self.standardize), temperature=self.temperature), {}


class MSELogits(Method):
    """Applies `mse_logits_loss` to the logits."""

    def __call__(self, inputs: LossInputs):
        return mse_logits_loss(inputs.student.logits, inputs.teacher.logits), {}
