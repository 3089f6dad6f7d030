"""Correlation of differences: the embeddings of neighbouring samples of the batch, student against teacher."""

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
    """Mean over i of sum over d of |D_i| |D_{i+1}|, with D = W_s s - W_t t and neighbours i, i + 1 in the batch.

    This is what comparison tables of the field call correlation congruence (CC); it is not the loss of Peng et al.
    2019, which compares kernel matrices. Time and memory O(B D).

    Args:
      student_embedding: float [B, D], W_s s.
      teacher_embedding: float [B, D], W_t t. Differentiated too: W_t is trained.
      axis_name: mapped axis (`jax.pmap`) over which the batch is split. The neighbours are those of the global batch,
        the value is the same on every device. Static.

    Returns:
      Scalar, mean over the B - 1 pairs of the global batch, at least float32.

    Raises:
      TypeError: embeddings are not floating point.
      ValueError: shapes that differ, or a global batch of one sample.

    References:
      The `Correlation` criterion of Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020,
      https://arxiv.org/abs/1910.10699, in the code that its authors released.
    """
    check_float("student_embedding", student_embedding, ndim=2)
    check_float("teacher_embedding", teacher_embedding, ndim=2)
    check_same_shape(student_embedding=student_embedding, teacher_embedding=teacher_embedding)
    difference = jnp.abs(at_least_float32(student_embedding) - at_least_float32(teacher_embedding))
    difference = gather_batch(difference, axis_name)
    check_several_samples("correlation_delta_loss", len(difference))
    return jnp.mean(jnp.sum(difference[:-1] * difference[1:], axis=1))


class CorrelationDelta(Method):
    """`correlation_delta_loss` on the pooled embeddings, through a trainable linear layer for each network.

    Attributes:
      embedding_size: Number of outputs of the linear layers.
    """

    embedding_size: Count = 128

    @nn.compact
    def __call__(self, inputs: LossInputs):
        student = Pointwise(self.embedding_size, use_bias=True, name="student")(inputs.student.embedding)
        teacher = Pointwise(self.embedding_size, use_bias=True, name="teacher")(inputs.teacher.embedding)
        return correlation_delta_loss(student, teacher, axis_name=self.axis_name), {}
