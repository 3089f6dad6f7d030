"""Normalized knowledge distillation: a confidence-weighted target term and a term for the other classes."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._checks import at_least_float32, check_labels, check_logits, check_temperature
from cskd_jax.losses._logits import decouple, is_class, read_logits
from cskd_jax.losses.base import LossInputs, Method, Positive


def weighted_target_loss(student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the cross-entropy with the labels, weighted by the teacher's probability of the label: -p^t_y ln p^s_y.

    This is the first part of `nkd_loss`, and it accompanies the Wasserstein distance of WKD. Time and memory are
    O(B C).

    Args:
      student_logits: Logits of the student, float [B, C].
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.
      labels: Labels, int [B], in [0, C).

    Returns:
      A scalar of at least float32: the mean over the batch.

    Raises:
      TypeError: If the logits are not floating point, or the labels not integers.
      ValueError: If shapes do not fit.

    References:
      See `nkd_loss`.
    """
    check_logits(student_logits, teacher_logits)
    check_labels(labels, student_logits.shape[0])
    student = jax.nn.log_softmax(at_least_float32(student_logits))
    teacher = lax.stop_gradient(jax.nn.softmax(at_least_float32(teacher_logits)))
    target = is_class(labels, student_logits.shape[1])
    return -jnp.mean(jnp.sum(jnp.where(target, teacher * student, 0), axis=1))


def nkd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes normalized knowledge distillation: -p^t_y ln p^s_y - gamma T^2 sum over c of q^t_c ln q^s_c.

    Here p = softmax(z), without a temperature, y is the label, and q is the softmax of z / T over the classes other
    than y. The second part is a cross-entropy: unlike a divergence, it is not 0 where student and teacher agree. Time
    and memory are O(B C).

    Args:
      student_logits: Logits of the student, float [B, C], with C >= 2.
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.
      labels: Labels, int [B], in [0, C); for a soft label, the authors' code uses the likeliest class.
      gamma: Weight of the other classes.
      temperature: Temperature T, greater than 0.

    Returns:
      A scalar, the mean over the batch, and the unweighted terms `target` and `non_target` (with T^2), all of at least
      float32.

    Raises:
      TypeError: If the logits are not floating point, or the labels not integers.
      ValueError: If shapes do not fit, if there are fewer than 2 classes, or if the temperature is not positive.

    References:
      Yang, Zeng, Li, Zhang, Yuan, Li, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach
      with Normalized Loss and Customized Soft Labels", ICCV 2023, https://arxiv.org/abs/2303.13005; code:
      https://github.com/yzd-v/cls_KD.
    """
    target = weighted_target_loss(student_logits, teacher_logits, labels)
    if student_logits.shape[1] < 2:
        raise ValueError(f"nkd_loss needs at least 2 classes, got {student_logits.shape[1]}")
    check_temperature(temperature)
    mask = is_class(labels, student_logits.shape[1])
    teacher = lax.stop_gradient(at_least_float32(teacher_logits))
    among_s = decouple(at_least_float32(student_logits) / temperature, mask)[2]
    among_t = decouple(teacher / temperature, mask)[2]
    non_target = -(temperature**2) * jnp.mean(jnp.sum(jnp.exp(among_t) * among_s, axis=1))
    return target + gamma * non_target, {"target": target, "non_target": non_target}


class NKD(Method):
    """Applies `nkd_loss` to the logits.

    Attributes:
      gamma: Weight of the distribution over the other classes.
      temperature: Temperature of that distribution, greater than 0.
      standardize: Whether the logits of every sample are first scaled to mean 0 and standard deviation 1.
    """

    gamma: float = 1.5
    temperature: Positive = 1.0
    standardize: bool = False
    multilabel: ClassVar[bool] = False

    def __call__(self, inputs: LossInputs):
        logits = read_logits(inputs, self.standardize)
        return nkd_loss(*logits, inputs.labels, gamma=self.gamma, temperature=self.temperature)


class WeightedTarget(Method):
    """Applies `weighted_target_loss` to the logits."""

    multilabel: ClassVar[bool] = False

    def __call__(self, inputs: LossInputs):
        return weighted_target_loss(inputs.student.logits, inputs.teacher.logits, inputs.labels), {}
