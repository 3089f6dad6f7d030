"""Correlation congruence: kernels between the samples of the batch."""

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
    """Correlation congruence loss: ||K^s - K^t||_F^2 / B^2, with K the kernel between samples of the global batch.

    K_ij = sum_{p=0}^{order} e^(-2 gamma) (2 gamma)^p / p! cos(x_i, x_j)^p, the Taylor form in the cosine of the
    Gaussian kernel exp(-gamma ||u_i - u_j||^2) between embeddings u of Euclidean norm 1.

    With embeddings of D and D' numbers, time O(B^2 (D + D' + order)) and memory O(B^2 + B (D + D')), on every device.

    Args:
      student_embedding: float [B, D].
      teacher_embedding: float [B, D'], of any size. Never differentiated.
      gamma: of the Gaussian kernel, greater than 0.
      order: of the Taylor form, at least 1.
      axis_name: mapped axis (`jax.pmap`) over which the batch is split. The embeddings of the global batch are
        gathered, the value is the same on every device. Static.

    Returns:
      Scalar, mean over the B^2 pairs of the global batch, at least float32. An embedding that is zero has cosine 0
      with every other, and zero gradient.

    Raises:
      TypeError: embeddings are not floating point.
      ValueError: embeddings without 2 dimensions, different batches, a global batch of one sample, or a gamma or an
        order out of range.

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
    """`correlation_congruence_loss` on the pooled embeddings.

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
