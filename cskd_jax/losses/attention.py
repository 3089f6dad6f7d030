"""Attention transfer: where on a stage's map the activation is."""

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._arrays import normalize, pool_to_common_size
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_batch, pair_stages
from cskd_jax.losses.base import LossInputs, Method


def attention_map(features: jax.Array) -> jax.Array:
    """Mean of the squared channels at each position, flattened and scaled to Euclidean norm 1.

    Args:
      features: float [B, H, W, D].

    Returns:
      Q [B, H W]; zero, with zero gradient, for a sample whose features are all zero.
    """
    return normalize(jnp.mean(jnp.square(features), axis=-1).reshape(features.shape[0], -1))


def attention_transfer_loss(student_features: jax.Array, teacher_features: jax.Array) -> jax.Array:
    """Attention transfer at one stage: mean (Q^s - Q^t)^2, with Q of `attention_map`.

    Where the maps differ in size, the larger is average-pooled to the smaller first. Time O(B H W D), memory O(B H W)
    beyond the features.

    Args:
      student_features: float [B, H, W, D].
      teacher_features: float [B, H', W', D'], any size and number of channels. Never differentiated.

    Returns:
      Scalar, mean over the B H W elements of Q, at least float32.

    Raises:
      TypeError: features are not floating point.
      ValueError: features without 4 dimensions, or of different batches.

    References:
      Zagoruyko, Komodakis, "Paying More Attention to Attention", ICLR 2017, https://arxiv.org/abs/1612.03928, Eq. 2
      (with the squared difference averaged instead of its norm, as comparison tables of the field have it).
    """
    check_float("student_features", student_features, ndim=4)
    check_float("teacher_features", teacher_features, ndim=4)
    check_same_batch(student_features=student_features, teacher_features=teacher_features)
    student, teacher = pool_to_common_size(at_least_float32(student_features), at_least_float32(teacher_features))
    return jnp.mean(jnp.square(attention_map(student) - lax.stop_gradient(attention_map(teacher))))


class AttentionTransfer(Method):
    """Sum of `attention_transfer_loss` over all stages."""

    def __call__(self, inputs: LossInputs):
        stages = pair_stages(inputs.student.features, inputs.teacher.features)
        return sum(attention_transfer_loss(student, teacher) for student, teacher in stages), {}
