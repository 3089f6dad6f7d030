"""A simple recipe: linearly mapped, normalized features of the student learn the teacher's by a log-sum."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._batch import count_batch, mean_batch, standardize_batch, sum_batch
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_shape, check_several_samples
from cskd_jax.losses._connectors import Orthogonal, Pointwise
from cskd_jax.losses.base import EmbeddingSource, LossInputs, Method, Positive
from cskd_jax.losses.embedding import read_student
from cskd_jax.losses.logits import kd_loss

# The first number is added to the sum in the correlation loss and the second to the variances in the other loss, as in
# the authors' code.
_EPSILON, _NORM_EPSILON = 1e-5, 1e-4


def srd_correlation_loss(
    student_embedding: jax.Array, teacher_embedding: jax.Array, *, power: float = 4.0, axis_name: str | None = None
) -> jax.Array:
    """Computes ln(sum over features d of |c_d - 1|^p + 1e-5), with the correlations c_d over the batch.

    Here c_d = mean over i of e_id t_id, for features scaled to mean 0 and variance 1 over the batch. This is the loss
    of the authors' program for Vision Transformers (DeiT). Time and memory are O(B D).

    Args:
      student_embedding: Embeddings of the student, mapped to the teacher's size, float [B, D].
      teacher_embedding: Embeddings of the teacher, float [B, D], never differentiated.
      power: Exponent p, greater than 1.
      axis_name: Name of the mapped axis (`jax.pmap`) over which the batch is split, static. Means and correlations are
        taken over the global batch, so the value is the same on every device.

    Returns:
      A scalar of at least float32. A feature that does not vary has correlation 0, with zero gradient.

    Raises:
      TypeError: If the embeddings are not floating point.
      ValueError: If shapes differ, if the global batch has one sample, or if the power is not greater than 1.

    References:
      Miles, Mikolajczyk, "Understanding the Role of the Projector in Knowledge Distillation", AAAI 2024,
      https://arxiv.org/abs/2303.11098; code: https://github.com/roymiles/Simple-Recipe-Distillation.
    """
    student, teacher = _checked("srd_correlation_loss", student_embedding, teacher_embedding, power, axis_name)
    student, teacher = (standardize_batch(x, axis_name) for x in (student, teacher))
    correlations = mean_batch(student * teacher, axis_name)
    return jnp.log(jnp.sum(jnp.abs(correlations - 1) ** power) + _EPSILON)


def srd_difference_loss(
    student_embedding: jax.Array, teacher_embedding: jax.Array, *, power: float = 4.0, axis_name: str | None = None
) -> jax.Array:
    """Computes ln(sum over samples i and features d of |e_id - t_id|^p) of normalized features.

    Features are scaled to mean 0 and variance 1 over the batch, with 1e-4 added to the variance. This is the loss of
    the authors' program for ResNets on ImageNet. Time and memory are O(B D).

    Args:
      student_embedding: Embeddings of the student, mapped to the teacher's size, float [B, D].
      teacher_embedding: Embeddings of the teacher, float [B, D], never differentiated.
      power: Exponent p, greater than 1.
      axis_name: Name of the mapped axis (`jax.pmap`) over which the batch is split, static. The sum is over the global
        batch, so the value is the same on every device.

    Returns:
      A scalar of at least float32. Where nothing differs, it is the logarithm of the smallest normal number, with zero
      gradient.

    Raises:
      TypeError: If the embeddings are not floating point.
      ValueError: If shapes differ, if the global batch has one sample, or if the power is not greater than 1.

    References:
      See `srd_correlation_loss`.
    """
    student, teacher = _checked("srd_difference_loss", student_embedding, teacher_embedding, power, axis_name)
    student, teacher = (standardize_batch(x, axis_name, epsilon=_NORM_EPSILON) for x in (student, teacher))
    total = sum_batch(jnp.sum(jnp.abs(student - teacher) ** power), axis_name)
    tiny = jnp.finfo(total.dtype).tiny
    return jnp.log(jnp.where(total <= tiny, tiny, total))


def _checked(loss, student_embedding, teacher_embedding, power, axis_name):
    check_float("student_embedding", student_embedding, ndim=2)
    check_float("teacher_embedding", teacher_embedding, ndim=2)
    check_same_shape(student_embedding=student_embedding, teacher_embedding=teacher_embedding)
    check_several_samples(loss, count_batch(student_embedding, axis_name))
    if not power > 1:
        raise ValueError(f"power must be greater than 1, got {power}")
    return at_least_float32(student_embedding), lax.stop_gradient(at_least_float32(teacher_embedding))


class SRD(Method):
    """Applies `srd_difference_loss` or `srd_correlation_loss` to the features of both networks, and `kd_loss`.

    A trained layer maps the features of the student to the teacher's size. The defaults are those of the authors'
    program for ImageNet. Their program for Vision Transformers uses the variant "correlation", a representation_weight
    of 1, and a kd_weight of 0.

    Attributes:
      variant: Loss of the features: "difference" or "correlation".
      projector: Layer that maps the student's features: "linear", with bias, as in the authors' programs, or
        "orthogonal", the matrix of vkd, whose parameters do not decay.
      student: Features of the student: "embedding", or "tokens", the mean over the positions of the last stage.
      power: Exponent of the loss of the features, greater than 1.
      representation_weight: Weight of the loss on the features.
      kd_weight: Weight of `kd_loss` on the logits; with 0, no logits are read.
      temperature: Temperature of the softmax of the logits, greater than 0.
    """

    variant: Literal["difference", "correlation"] = "difference"
    projector: Literal["linear", "orthogonal"] = "linear"
    student: EmbeddingSource = "embedding"
    power: Positive = 4.0
    representation_weight: float = 2.0
    kd_weight: float = 1.0
    temperature: Positive = 1.0

    @property
    def softmax(self) -> bool:
        return self.kd_weight != 0

    @property
    def undecayed(self) -> tuple[str, ...]:
        return ("projector",) if self.projector == "orthogonal" else ()

    @nn.compact
    def __call__(self, inputs: LossInputs):
        student, teacher = read_student(inputs, self.student), inputs.teacher.embedding
        if self.projector == "orthogonal":
            mapped = Orthogonal(teacher.shape[-1], name="projector")(student)
        else:
            mapped = Pointwise(teacher.shape[-1], use_bias=True, name="projector")(student)
        loss = srd_difference_loss if self.variant == "difference" else srd_correlation_loss
        representation = loss(mapped, teacher, power=self.power, axis_name=self.axis_name)
        if not self.kd_weight:
            return self.representation_weight * representation, {"representation": representation}
        kd = kd_loss(inputs.student.logits, inputs.teacher.logits, temperature=self.temperature)
        value = self.representation_weight * representation + self.kd_weight * kd
        return value, {"representation": representation, "kd": kd}
