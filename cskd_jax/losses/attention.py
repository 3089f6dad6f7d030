"""Attention transfer: the student learns where the activation is on the map of each stage."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._arrays import normalize, pool_to_common_size
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_batch, pair_stages
from cskd_jax.losses.base import LossInputs, Method


def attention_map(features: jax.Array) -> jax.Array:
    """Averages the squared channels at each position, flattens the map and scales it to Euclidean norm 1.

    Args:
      features: Feature maps, float [B, H, W, D].

    Returns:
      Q [B, H W], of at least float32; zero, with zero gradient, for a sample whose features are all zero.
    """
    return normalize(jnp.mean(jnp.square(at_least_float32(features)), axis=-1).reshape(features.shape[0], -1))


def attention_transfer_loss(student_features: jax.Array, teacher_features: jax.Array) -> jax.Array:
    """Computes attention transfer at one stage: the mean of (Q^s - Q^t)^2, with Q from `attention_map`.

    Where the maps differ in size, the larger is first average-pooled to the smaller. Time is O(B H W D), memory O(B H
    W) beyond the features.

    Args:
      student_features: Feature maps of the student, float [B, H, W, D].
      teacher_features: Feature maps of the teacher, float [B, H', W', D'], with any size and number of channels. They
        are never differentiated.

    Returns:
      A scalar of at least float32: the mean over the B H W elements of Q.

    Raises:
      TypeError: If the features are not floating point.
      ValueError: If the features do not have 4 dimensions, or if their batches differ.

    References:
      Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, https://arxiv.org/abs/1612.03928, Eq. 2.
      The squared difference is averaged instead of taking its norm, as in the reference code of CRD (Tian et al. 2020,
      https://github.com/HobbitLong/RepDistiller).
    """
    check_float("student_features", student_features, ndim=4)
    check_float("teacher_features", teacher_features, ndim=4)
    check_same_batch(student_features=student_features, teacher_features=teacher_features)
    student, teacher = pool_to_common_size(at_least_float32(student_features), at_least_float32(teacher_features))
    return jnp.mean(jnp.square(attention_map(student) - lax.stop_gradient(attention_map(teacher))))


class AttentionTransfer(Method):
    """Sums `attention_transfer_loss` over all stages."""

    version: ClassVar[int] = 2

    def __call__(self, inputs: LossInputs):
        stages = pair_stages(inputs.student.stages, inputs.teacher.stages)
        return sum(attention_transfer_loss(student, teacher) for student, teacher in stages), {}
