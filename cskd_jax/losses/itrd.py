"""Information theoretic representation distillation: correlations of features, and similarities of samples."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._arrays import normalize
from cskd_jax.losses._batch import count_batch, gather_batch, mean_batch, standardize_batch
from cskd_jax.losses._checks import (
    at_least_float32,
    check_float,
    check_same_batch,
    check_same_shape,
    check_several_samples,
)
from cskd_jax.losses._connectors import Pointwise
from cskd_jax.losses.base import LossInputs, Method, Positive


def itrd_correlation_loss(
    student_embedding: jax.Array, teacher_embedding: jax.Array, *, alpha: float = 1.5, axis_name: str | None = None
) -> jax.Array:
    """Computes the correlation loss: log2 of the sum over features d of |c_d - 1|^(2 alpha).

    Here c_d = 1/B sum over i of e_id t_id, for features scaled to mean 0 and deviation 1 over the batch. The sum of
    squares in the deviation is divided by B - 1, so c_d is at most (B - 1)/B. Time and memory are O(B D).

    Args:
      student_embedding: Embeddings of the student, mapped to the teacher's size, float [B, D].
      teacher_embedding: Embeddings of the teacher, float [B, D], never differentiated.
      alpha: Order of Renyi's entropy, greater than 0.
      axis_name: Name of the mapped axis (`jax.pmap`) over which the batch is split, static. Means and correlations are
        those of the global batch, so the value is the same on every device.

    Returns:
      A scalar of at least float32. A feature that does not vary has correlation 0, with zero gradient.

    Raises:
      TypeError: If the embeddings are not floating point.
      ValueError: If shapes differ, if the global batch has one sample, or if alpha is not positive.

    References:
      Miles, Lopez-Rodriguez, Mikolajczyk, "Information Theoretic Representation Distillation", BMVC 2022,
      https://arxiv.org/abs/2112.00459; code: https://github.com/roymiles/ITRD.
    """
    check_float("student_embedding", student_embedding, ndim=2)
    check_float("teacher_embedding", teacher_embedding, ndim=2)
    check_same_shape(student_embedding=student_embedding, teacher_embedding=teacher_embedding)
    check_several_samples("itrd_correlation_loss", count_batch(student_embedding, axis_name))
    if not alpha > 0:
        raise ValueError(f"alpha must be greater than 0, got {alpha}")
    student, teacher = at_least_float32(student_embedding), lax.stop_gradient(at_least_float32(teacher_embedding))
    student, teacher = (standardize_batch(x, axis_name, unbiased=True) for x in (student, teacher))
    correlations = mean_batch(student * teacher, axis_name)
    return jnp.log2(jnp.sum(jnp.abs(correlations - 1) ** (2 * alpha)))


def itrd_mutual_loss(
    student_embedding: jax.Array, teacher_embedding: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
    """Computes the mutual information loss: sum of G_ij^2 - sum of J_ij^2 over the pairs of samples.

    G holds the cosines of the student's embeddings, divided by their trace, and J their elementwise products with the
    teacher's cosines, also divided by their trace: the sums give the quadratic entropies of the student alone and of
    both. Time is O(B^2 D), memory O(B D + B^2), on every device.

    Args:
      student_embedding: Embeddings of the student, float [B, D].
      teacher_embedding: Embeddings of the teacher, float [B, D'], never differentiated.
      axis_name: Name of the mapped axis (`jax.pmap`) over which the batch is split, static. The embeddings of the
        global batch are gathered, so the value is the same on every device.

    Returns:
      A scalar of at least float32. A sample whose embedding is zero has similarity 0 to all, with zero gradient.

    Raises:
      TypeError: If the embeddings are not floating point.
      ValueError: If batches differ.

    References:
      See `itrd_correlation_loss`.
    """
    check_float("student_embedding", student_embedding, ndim=2)
    check_float("teacher_embedding", teacher_embedding, ndim=2)
    check_same_batch(student_embedding=student_embedding, teacher_embedding=teacher_embedding)
    student = _cosines(at_least_float32(student_embedding), axis_name)
    joint = student * lax.stop_gradient(_cosines(at_least_float32(teacher_embedding), axis_name))
    return _purity(student) - _purity(joint)


def _cosines(embedding, axis_name):
    rows = gather_batch(normalize(embedding), axis_name)
    return jnp.dot(rows, rows.T, precision=lax.Precision.HIGHEST)


def _purity(kernel):
    """Returns the sum of squares of a kernel divided by its trace; 0 for a kernel of zeros."""
    trace = jnp.trace(kernel)
    return jnp.sum(jnp.square(kernel / jnp.where(trace > 0, trace, 1)))


class ITRD(Method):
    """Applies `itrd_correlation_loss` and `itrd_mutual_loss` to the pooled embeddings.

    A trained linear layer maps the student's embeddings to the teacher's size. The mutual information uses the mapped
    embeddings where the sizes differ, as in the authors' code, and the embeddings themselves where they are equal.

    Attributes:
      alpha: Order of the entropy in the correlation loss; the authors' example uses 1.01.
      correlation_weight: Weight of the correlation loss.
      mutual_weight: Weight of the mutual information loss; the authors' example uses 1.
    """

    alpha: Positive = 1.5
    correlation_weight: float = 2.0
    mutual_weight: float = 0.05

    @nn.compact
    def __call__(self, inputs: LossInputs):
        student, teacher = inputs.student.embedding, inputs.teacher.embedding
        mapped = Pointwise(teacher.shape[-1], use_bias=True, name="embed")(student)
        correlation = itrd_correlation_loss(mapped, teacher, alpha=self.alpha, axis_name=self.axis_name)
        related = student if student.shape[-1] == teacher.shape[-1] else mapped
        mutual = itrd_mutual_loss(related, teacher, axis_name=self.axis_name)
        value = self.correlation_weight * correlation + self.mutual_weight * mutual
        return value, {"correlation": correlation, "mutual": mutual}
