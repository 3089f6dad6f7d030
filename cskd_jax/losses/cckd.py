"""Correlation congruence: the student learns the kernels between the samples of the batch."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._arrays import normalize
from cskd_jax.losses._batch import gather_batch
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_batch, check_several_samples
from cskd_jax.losses.base import Count, LossInputs, Method, Positive


def correlation_congruence_loss(
    student_embedding: jax.Array,
    teacher_embedding: jax.Array,
    *,
    gamma: float = 0.4,
    order: int = 2,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes the correlation congruence loss ||K^s - K^t||_F^2 / B^2 between kernels K of the global batch.

    K_ij = sum_{p=0}^{order} e^(-2 gamma) (2 gamma)^p / p! cos(x_i, x_j)^p, the Taylor form in the cosine of the
    Gaussian kernel exp(-gamma ||u_i - u_j||^2) between embeddings u of Euclidean norm 1.

    With embeddings of D and D' numbers, time is O(B^2 (D + D' + order)) and memory O(B^2 + B (D + D')), on every
    device.

    Args:
      student_embedding: Embeddings of the student, float [B, D].
      teacher_embedding: Embeddings of the teacher, float [B, D'], of any size, never differentiated.
      gamma: Factor in the exponent of the Gaussian kernel, greater than 0.
      order: Order of the Taylor form, at least 1.
      axis_name: Name of the mapped axis (`jax.pmap`) over which the batch is split, static. The embeddings of the
        global batch are gathered, so the value is the same on every device.

    Returns:
      A scalar of at least float32: the mean over the B^2 pairs of the global batch. An embedding that is zero has
      cosine 0 with every other, and zero gradient.

    Raises:
      TypeError: If the embeddings are not floating point.
      ValueError: If the embeddings do not have 2 dimensions, if their batches differ, if the global batch has one
        sample, or if gamma or the order is out of range.

    References:
      Peng, Jin, Liu, Zhou, Wu, Liu, Li, Zhang, "Correlation Congruence for Knowledge Distillation", ICCV 2019,
      https://arxiv.org/abs/1904.01802, section 3.3, with the gamma and the order of its section 4.
    """
    check_float("student_embedding", student_embedding, ndim=2)
    check_float("teacher_embedding", teacher_embedding, ndim=2)
    check_same_batch(student_embedding=student_embedding, teacher_embedding=teacher_embedding)
    if not gamma > 0:
        raise ValueError(f"gamma must be greater than 0, got {gamma}")
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    coefficients = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]
    student = _kernel(student_embedding, coefficients, axis_name)
    teacher = lax.stop_gradient(_kernel(teacher_embedding, coefficients, axis_name))
    return jnp.mean(jnp.square(student - teacher))


def _kernel(embedding, coefficients, axis_name):
    x = gather_batch(normalize(at_least_float32(embedding)), axis_name)
    check_several_samples("correlation_congruence_loss", len(x))
    cosines = jnp.dot(x, x.T, precision=lax.Precision.HIGHEST)
    kernel = jnp.full_like(cosines, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        kernel = kernel * cosines + coefficient
    return kernel


class CorrelationCongruence(Method):
    """Applies `correlation_congruence_loss` to the pooled embeddings.

    Attributes:
      gamma: Factor in the exponent of the Gaussian kernel, greater than 0.
      order: Order of the Taylor form of the kernel, at least 1.
    """

    gamma: Positive = 0.4
    order: Count = 2

    def __call__(self, inputs: LossInputs):
        value = correlation_congruence_loss(
            inputs.student.embedding,
            inputs.teacher.embedding,
            gamma=self.gamma,
            order=self.order,
            axis_name=self.axis_name,
        )
        return value, {}
