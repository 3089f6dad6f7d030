"""Correlation of student-teacher differences between neighboring samples of the batch."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from cskd_jax.losses._batch import gather_batch
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_shape, check_several_samples
from cskd_jax.losses._connectors import Pointwise
from cskd_jax.losses.base import Count, LossInputs, Method


def correlation_delta_loss(
    student_embedding: jax.Array, teacher_embedding: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
    """Computes the mean over i of sum over d of |D_i| |D_{i+1}|, with D = W_s s - W_t t for sample i of the batch.

    The reference code of CRD (Tian et al. 2020) and the tables that use it call this loss correlation congruence (CC).
    It is not the loss of Peng et al. 2019, which compares kernel matrices. Time and memory are O(B D).

    Args:
      student_embedding: Mapped embeddings of the student W_s s, float [B, D].
      teacher_embedding: Mapped embeddings of the teacher W_t t, float [B, D]. They are differentiated too, because W_t
        is trained.
      axis_name: Name of the mapped axis (`jax.pmap`) over which the batch is split, static. Neighbors are taken in the
        global batch, so the value is the same on every device.

    Returns:
      A scalar of at least float32: the mean over the B - 1 pairs of neighbors of the global batch.

    Raises:
      TypeError: If the embeddings are not floating point.
      ValueError: If shapes differ, or if the global batch has one sample.

    References:
      The `Correlation` criterion of Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020,
      https://arxiv.org/abs/1910.10699, in its reference code, https://github.com/HobbitLong/RepDistiller.
    """
    check_float("student_embedding", student_embedding, ndim=2)
    check_float("teacher_embedding", teacher_embedding, ndim=2)
    check_same_shape(student_embedding=student_embedding, teacher_embedding=teacher_embedding)
    difference = jnp.abs(at_least_float32(student_embedding) - at_least_float32(teacher_embedding))
    difference = gather_batch(difference, axis_name)
    check_several_samples("correlation_delta_loss", len(difference))
    return jnp.mean(jnp.sum(difference[:-1] * difference[1:], axis=1))


class CorrelationDelta(Method):
    """Applies `correlation_delta_loss` to the pooled embeddings, through a trainable linear layer for each network.

    Attributes:
      embedding_size: Number of outputs of the linear layers.
    """

    embedding_size: Count = 128

    @nn.compact
    def __call__(self, inputs: LossInputs):
        student = Pointwise(self.embedding_size, use_bias=True, name="student")(inputs.student.embedding)
        teacher = Pointwise(self.embedding_size, use_bias=True, name="teacher")(inputs.teacher.embedding)
        return correlation_delta_loss(student, teacher, axis_name=self.axis_name), {}
