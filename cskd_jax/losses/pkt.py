"""Probabilistic knowledge transfer: the student learns, for each sample, which others in the batch resemble it."""

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._arrays import safe_sqrt
from cskd_jax.losses._batch import gather_batch
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_batch, check_several_samples
from cskd_jax.losses.base import LossInputs, Method, Positive


def pkt_loss(
    student_embedding: jax.Array,
    teacher_embedding: jax.Array,
    *,
    epsilon: float = 1e-7,
    axis_name: str | None = None,
) -> jax.Array:
    """Computes probabilistic knowledge transfer: the mean of p^t ln((p^t + e) / (p^s + e)).

    p_ij = (cos_ij + 1) / 2 divided by its sum over j, with cos_ij = <x_i, x_j> / ((||x_i|| + e) (||x_j|| + e)). With D
    and D' numbers per sample, time is O(B^2 (D + D')) and memory O(B^2 + B (D + D')).

    Args:
      student_embedding: Embeddings of the student, float [B, D].
      teacher_embedding: Embeddings of the teacher, float [B, D'], never differentiated.
      epsilon: Small number e, greater than 0.
      axis_name: Name of the mapped axis (`jax.pmap`) over which the batch is split, static. The embeddings of the
        global batch are gathered, so the value is the same on every device.

    Returns:
      A scalar of at least float32: the mean over the B^2 pairs of the global batch. A zero embedding has cosine 0 with
      all others, and zero gradient.

    Raises:
      TypeError: If the embeddings are not floating point.
      ValueError: If the embeddings do not have 2 dimensions, if their batches differ, if the global batch has one
        sample, or if epsilon is not positive.

    References:
      Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018,
      https://arxiv.org/abs/1803.10837.
    """
    check_float("student_embedding", student_embedding, ndim=2)
    check_float("teacher_embedding", teacher_embedding, ndim=2)
    check_same_batch(student_embedding=student_embedding, teacher_embedding=teacher_embedding)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be greater than 0, got {epsilon}")
    student = _probabilities(student_embedding, epsilon, axis_name)
    teacher = lax.stop_gradient(_probabilities(teacher_embedding, epsilon, axis_name))
    return jnp.mean(teacher * jnp.log((teacher + epsilon) / (student + epsilon)))


def _probabilities(embedding, epsilon, axis_name):
    embedding = gather_batch(at_least_float32(embedding), axis_name)
    check_several_samples("pkt_loss", len(embedding))
    norms = safe_sqrt(jnp.sum(jnp.square(embedding), axis=1, keepdims=True))
    # A zero embedding would have the gradient 1 / epsilon.
    embedding = embedding * jnp.where(norms > 0, 1 / (norms + epsilon), 0)
    similarities = (jnp.dot(embedding, embedding.T, precision=lax.Precision.HIGHEST) + 1) / 2
    return similarities / jnp.sum(similarities, axis=1, keepdims=True)


class PKT(Method):
    """Applies `pkt_loss` to the pooled embeddings.

    Attributes:
      epsilon: Small number that keeps divisions and logarithms finite, greater than 0.
    """

    epsilon: Positive = 1e-7

    def __call__(self, inputs: LossInputs):
        student, teacher = inputs.student.embedding, inputs.teacher.embedding
        return pkt_loss(student, teacher, epsilon=self.epsilon, axis_name=self.axis_name), {}
