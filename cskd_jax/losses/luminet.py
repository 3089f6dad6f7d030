"""LumiNet: distillation of logits that are standardized per class over the batch."""

from typing import ClassVar

import jax

from cskd_jax.losses._batch import gather_batch, standardize_batch
from cskd_jax.losses._checks import at_least_float32, check_logits, check_several_samples, check_temperature
from cskd_jax.losses.base import LossInputs, Method, Positive
from cskd_jax.losses.logits import kd_loss

# This number is added to the variance, as in the authors' code.
_EPSILON = 1e-5


def perception(logits: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Scales the logits of each class to mean 0 and variance 1 over the global batch.

    This computes h(z) = (z - mean z) / sqrt(var z + 1e-5), with the sum of squares in var divided by the number of
    samples.

    Args:
      logits: Logits, float [B, C].
      axis_name: Name of the mapped axis over which the batch is split, static.

    Returns:
      The rows of the global batch on every device, at least float32.
    """
    return standardize_batch(gather_batch(at_least_float32(logits), axis_name), None, epsilon=_EPSILON)


def luminet_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    alpha: float = 31.0,
    temperature: float = 4.0,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes LumiNet: alpha^2 KL(softmax(h(z^t) / T) || softmax(h(z^s) / T)), with h from `perception`.

    Where other losses have a factor T^2, the authors' code has alpha^2. Time and memory are O(B C) on every device.

    Args:
      student_logits: Logits of the student, float [B, C].
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.
      alpha: Factor alpha.
      temperature: Temperature T, greater than 0.
      axis_name: Name of the mapped axis over which the batch is split, static. Means and variances are taken over the
        global batch, so the value is the same on every device.

    Returns:
      A scalar of at least float32: the mean over the global batch of the sum over classes.

    Raises:
      TypeError: If the logits are not floating point.
      ValueError: If shapes differ, if the global batch has one sample, or if the temperature is not positive.

    References:
      Hossain, Elahi, Ramasinghe, Cheraghian, Rahman, Mohammed, Rahman, "LumiNet: Perception-Driven Knowledge
      Distillation via Statistical Logit Calibration", https://arxiv.org/abs/2310.03669; code:
      https://github.com/ismail31416/LumiNet.
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    student, teacher = (perception(z, axis_name=axis_name) / temperature for z in (student_logits, teacher_logits))
    check_several_samples("luminet_loss", len(student))
    return alpha**2 * kd_loss(student, teacher, temperature=1.0)


class LumiNet(Method):
    """Applies `luminet_loss` to the logits.

    Attributes:
      alpha: Factor whose square multiplies the divergence.
      temperature: Temperature of the softmax, greater than 0.
    """

    alpha: float = 31.0
    temperature: Positive = 4.0
    softmax: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs):
        value = luminet_loss(
            inputs.student.logits,
            inputs.teacher.logits,
            alpha=self.alpha,
            temperature=self.temperature,
            axis_name=self.axis_name,
        )
        return value, {}
