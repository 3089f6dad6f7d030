"""Similarity preserving: the student learns which samples of the batch resemble each other."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._arrays import normalize
from cskd_jax.losses._batch import gather_batch
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_batch, check_several_samples
from cskd_jax.losses.base import LossInputs, Method


def similarity_preserving_loss(
    student_features: jax.Array, teacher_features: jax.Array, *, axis_name: str | None = None
) -> jax.Array:
    """Computes the similarity-preserving loss ||G^s - G^t||_F^2 / B^2.

    G is F F^T with each row scaled to Euclidean norm 1, where each row of F holds the flattened features of a sample,
    and B is the size of the global batch. With D and D' numbers per sample, time is O(B^2 (D + D')) and memory O(B^2 +
    B (D + D')).

    Args:
      student_features: Features of the student, float [B, ...].
      teacher_features: Features of the teacher, float [B, ...], of any size, never differentiated.
      axis_name: Name of the mapped axis (`jax.pmap`) over which the batch is split, static. The features of the global
        batch are gathered, so the value is the same on every device.

    Returns:
      A scalar of at least float32: the mean over the B^2 pairs of the global batch. The row of a sample whose features
      are all zero is zero and contributes no gradient.

    Raises:
      TypeError: If the features are not floating point.
      ValueError: If batches differ, or if the global batch has one sample.

    References:
      Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, https://arxiv.org/abs/1907.09682.
    """
    check_float("student_features", student_features, min_ndim=2)
    check_float("teacher_features", teacher_features, min_ndim=2)
    check_same_batch(student_features=student_features, teacher_features=teacher_features)
    student = _similarities(student_features, axis_name)
    teacher = lax.stop_gradient(_similarities(teacher_features, axis_name))
    return jnp.mean(jnp.square(student - teacher))


def _similarities(features, axis_name):
    features = gather_batch(at_least_float32(features.reshape(features.shape[0], -1)), axis_name)
    check_several_samples("similarity_preserving_loss", len(features))
    return normalize(jnp.dot(features, features.T, precision=lax.Precision.HIGHEST))


class SimilarityPreserving(Method):
    """Applies `similarity_preserving_loss` to the maps of the last stage."""

    version: ClassVar[int] = 2

    def __call__(self, inputs: LossInputs):
        student, teacher = inputs.student.stages[-1], inputs.teacher.stages[-1]
        return similarity_preserving_loss(student, teacher, axis_name=self.axis_name), {}
