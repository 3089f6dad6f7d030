"""Plain distances between embeddings: the student learns the teacher's features, without labels and without logits."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._arrays import mean_over_positions, normalize
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_shape
from cskd_jax.losses._connectors import Pointwise
from cskd_jax.losses.base import EmbeddingSource, LossInputs, Method


def cosine_embedding_loss(student_embedding: jax.Array, teacher_embedding: jax.Array) -> jax.Array:
    """Computes the mean of 1 - cos(f^s, f^t), the cosine distance of embeddings.

    Args:
      student_embedding: Embeddings of the student, mapped to the teacher's size, float [B, D].
      teacher_embedding: Embeddings of the teacher, float [B, D], never differentiated.

    Returns:
      A scalar of at least float32: the mean over the batch, in [0, 2]. An embedding of length 0 has cosine 0 with any
      other, with zero gradient.

    Raises:
      TypeError: If the embeddings are not floating point.
      ValueError: If shapes differ.
    """
    student, teacher = _checked(student_embedding, teacher_embedding)
    return jnp.mean(1 - jnp.sum(normalize(student) * normalize(teacher), axis=1))


def smooth_l1_loss(student_embedding: jax.Array, teacher_embedding: jax.Array) -> jax.Array:
    """Computes the smooth L1 distance: (a - b)^2 / 2 where |a - b| < 1, and |a - b| - 1/2 elsewhere.

    Args:
      student_embedding: Embeddings of the student, mapped to the teacher's size, float [B, D].
      teacher_embedding: Embeddings of the teacher, float [B, D], never differentiated.

    Returns:
      A scalar of at least float32: the mean over all B D elements.

    Raises:
      TypeError: If the embeddings are not floating point.
      ValueError: If shapes differ.
    """
    student, teacher = _checked(student_embedding, teacher_embedding)
    distance = jnp.abs(student - teacher)
    return jnp.mean(jnp.where(distance < 1, jnp.square(distance) / 2, distance - 0.5))


def _checked(student, teacher):
    check_float("student_embedding", student, ndim=2)
    check_float("teacher_embedding", teacher, ndim=2)
    check_same_shape(student_embedding=student, teacher_embedding=teacher)
    return at_least_float32(student), lax.stop_gradient(at_least_float32(teacher))


class _Embeddings(Method):
    """A loss between embeddings, with the student's mapped to the teacher's size by a trained linear layer.

    Attributes:
      student: Features of the student: "embedding", or "tokens", the mean over the positions of the last stage.
    """

    student: EmbeddingSource = "embedding"

    def _read(self, inputs: LossInputs) -> tuple[jax.Array, jax.Array]:
        teacher = inputs.teacher.embedding
        projector = Pointwise(teacher.shape[-1], use_bias=True, name="projector")
        return projector(read_student(inputs, self.student)), teacher


class CosineEmbedding(_Embeddings):
    """Applies `cosine_embedding_loss` to the embeddings of both networks.

    A trained linear layer with bias maps the student's embedding to the teacher's size. Neither labels nor logits are
    read, so the training images need no labels; when used from Python, the teacher may have different classes.

    Attributes:
      student: Features of the student: "embedding", or "tokens", the mean over the positions of the last stage.
    """

    @nn.compact
    def __call__(self, inputs: LossInputs):
        return cosine_embedding_loss(*self._read(inputs)), {}


class SmoothL1Embedding(_Embeddings):
    """Applies `smooth_l1_loss` to the embeddings of both networks.

    A trained linear layer with bias maps the student's embedding to the teacher's size. Neither labels nor logits are
    read, so the training images need no labels; when used from Python, the teacher may have different classes.

    Attributes:
      student: Features of the student: "embedding", or "tokens", the mean over the positions of the last stage.
    """

    @nn.compact
    def __call__(self, inputs: LossInputs):
        return smooth_l1_loss(*self._read(inputs)), {}


def read_student(inputs: LossInputs, source: EmbeddingSource) -> jax.Array:
    """Returns the features of the student that an embedding loss compares with the teacher's, [B, D]."""
    if source == "tokens":
        return mean_over_positions(at_least_float32(inputs.student.stages[-1]))
    return inputs.student.embedding
