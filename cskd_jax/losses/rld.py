"""Refined logit distillation: the teacher's confidence, and those of its class relations that are not misleading."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._checks import at_least_float32, check_labels, check_logits, check_temperature
from cskd_jax.losses._logits import binary_divergence, decouple, is_class, masked_log_softmax, read_logits
from cskd_jax.losses.base import LossInputs, Method, Positive


def rld_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    alpha_temperature: float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes refined logit distillation: alpha SCD + beta MCD.

    Sample confidence distillation compares how sure both networks are: SCD = T_a^2 KL((b, 1 - b) || (a, 1 - a)), with
    the student's probability a of the label and the teacher's probability b of its own likeliest class, at the
    temperature T_a. Masked correlation distillation compares the classes to which the teacher gives a lower logit than
    to the label: MCD = T^2 KL(q^t || q^s), with the softmax q of z / T over those classes. So a wrong teacher teaches
    neither its mistake nor anything about the classes that it prefers to the label. Time and memory are O(B C).

    Args:
      student_logits: Logits of the student, float [B, C], with C >= 2.
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.
      labels: Labels, int [B], in [0, C).
      alpha: Weight of SCD.
      beta: Weight of MCD.
      temperature: Temperature T of MCD, greater than 0.
      alpha_temperature: Temperature T_a of SCD, greater than 0.

    Returns:
      A scalar, the mean over the batch, and the unweighted terms `confidence` (SCD) and `correlation` (MCD), all of at
      least float32. A sample whose label has the smallest logit of the teacher adds 0 to MCD, with zero gradient.

    Raises:
      TypeError: If the logits are not floating point, or the labels not integers.
      ValueError: If shapes do not fit, if there are fewer than 2 classes, or if a temperature is not positive.

    References:
      Sun, Chen, Lyu, Chen, Chen, Wang, "Knowledge Distillation with Refined Logits", ICCV 2025,
      https://arxiv.org/abs/2408.07703; code: https://github.com/zju-SWJ/RLD.
    """
    check_logits(student_logits, teacher_logits)
    check_labels(labels, student_logits.shape[0])
    num_classes = student_logits.shape[1]
    if num_classes < 2:
        raise ValueError(f"rld_loss needs at least 2 classes, got {num_classes}")
    check_temperature(temperature)
    check_temperature(alpha_temperature)
    student, teacher = at_least_float32(student_logits), lax.stop_gradient(at_least_float32(teacher_logits))
    target = is_class(labels, num_classes)
    likeliest = is_class(jnp.argmax(teacher, axis=1), num_classes)
    confidence_s = decouple(student / alpha_temperature, target)[:2]
    confidence_t = decouple(teacher / alpha_temperature, likeliest)[:2]
    confidence = alpha_temperature**2 * jnp.mean(binary_divergence(confidence_t, confidence_s))
    of_label = jnp.sum(jnp.where(target, teacher, 0), axis=1, keepdims=True)
    # A compiler may compute the label's logit twice, with different rounding, and it must not count as below itself.
    below = (teacher < of_label) & ~target
    log_s, log_t = (masked_log_softmax(x / temperature, below) for x in (student, teacher))
    correlation = temperature**2 * jnp.mean(jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=1))
    return alpha * confidence + beta * correlation, {"confidence": confidence, "correlation": correlation}


class RLD(Method):
    """Applies `rld_loss` to the logits.

    Attributes:
      alpha: Weight of the confidence.
      beta: Weight of the relations between classes.
      temperature: Temperature of the relations, greater than 0.
      alpha_temperature: Temperature of the confidence, greater than 0.
      standardize: Whether the logits of every sample are first scaled to mean 0 and standard deviation 1.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: Positive = 4.0
    alpha_temperature: Positive = 1.0
    standardize: bool = False
    multilabel: ClassVar[bool] = False

    def __call__(self, inputs: LossInputs):
        return rld_loss(
            *read_logits(inputs, self.standardize),
            inputs.labels,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            alpha_temperature=self.alpha_temperature,
        )
