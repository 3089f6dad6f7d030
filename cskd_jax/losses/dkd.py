"""Decoupled knowledge distillation: the target class and the other classes have separate weights."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._checks import at_least_float32, check_labels, check_logits, check_temperature
from cskd_jax.losses._logits import binary_divergence, decouple, is_class, read_logits
from cskd_jax.losses.base import LossInputs, Method, Positive


def dkd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | jax.Array = 4.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes decoupled knowledge distillation: T^2 (alpha TCKD + beta NCKD).

    With p = softmax(z / T) and the label y, TCKD = KL(b^t || b^s) with b = (p_y, 1 - p_y), and NCKD = KL(q^t || q^s)
    with q the softmax of z / T over the classes other than y. Both are computed from logarithms and are finite for any
    finite logits. Time and memory are O(B C).

    The paper multiplies the loss by min(epoch / 20, 1): that is a schedule of its weight, not part of the loss.

    Args:
      student_logits: Logits of the student, float [B, C], with C >= 3.
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.
      labels: Labels, int [B], in [0, C).
      alpha: Weight of TCKD.
      beta: Weight of NCKD.
      temperature: Temperature T, greater than 0; it may be an array, which is not checked and may be differentiated.

    Returns:
      A scalar, the mean over the batch of sums over the classes, and the unweighted terms `target` (T^2 TCKD) and
      `non_target` (T^2 NCKD), all of at least float32.

    Raises:
      TypeError: If the logits are not floating point, or the labels not integers.
      ValueError: If shapes do not fit, if there are fewer than 3 classes (with 2 there is one class besides the target,
        and nothing to compare), or if the temperature is not positive.

    References:
      Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, https://arxiv.org/abs/2203.08679.
    """
    check_logits(student_logits, teacher_logits)
    check_labels(labels, student_logits.shape[0])
    if student_logits.shape[1] < 3:
        raise ValueError(f"dkd_loss needs at least 3 classes, got logits of shape {student_logits.shape}")
    check_temperature(temperature)
    is_target = is_class(labels, student_logits.shape[1])
    target_s, others_s, among_s = decouple(at_least_float32(student_logits) / temperature, is_target)
    teacher = lax.stop_gradient(at_least_float32(teacher_logits))
    target_t, others_t, among_t = decouple(teacher / temperature, is_target)
    target = temperature**2 * jnp.mean(binary_divergence((target_t, others_t), (target_s, others_s)))
    non_target = temperature**2 * jnp.mean(jnp.sum(jnp.exp(among_t) * (among_t - among_s), axis=1))
    return alpha * target + beta * non_target, {"target": target, "non_target": non_target}


class DKD(Method):
    """Applies `dkd_loss` to the logits.

    Attributes:
      alpha: Weight of the target class against all others.
      beta: Weight of the distribution over the other classes.
      temperature: Temperature of the softmax, greater than 0.
      standardize: Whether the logits of every sample are first scaled to mean 0 and standard deviation 1.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: Positive = 4.0
    standardize: bool = False
    multilabel: ClassVar[bool] = False

    def __call__(self, inputs: LossInputs):
        return dkd_loss(
            *read_logits(inputs, self.standardize),
            inputs.labels,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
        )
