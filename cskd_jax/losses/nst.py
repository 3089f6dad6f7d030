"""Neuron selectivity transfer: the student learns the distribution of the channels' activation patterns."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._arrays import normalize, pool_to_common_size
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_batch, pair_stages
from cskd_jax.losses.base import LossInputs, Method


def nst_loss(student_features: jax.Array, teacher_features: jax.Array) -> jax.Array:
    """Computes neuron selectivity transfer at one stage: the squared maximum mean discrepancy between channels.

    The loss is mean k(t, t) + mean k(s, s) - 2 mean k(s, t), with k(a, b) = <a, b>^2 for the patterns of two channels.
    A pattern consists of the values of a channel at all positions of a sample, scaled to Euclidean norm 1 (zero where
    the channel is zero). The means are over the samples and the pairs of channels.

    Where the maps differ in size, the larger is first average-pooled to the smaller. With P positions each kernel takes
    time O(B P D D') and memory O(B min(P^2, D D')).

    Args:
      student_features: Feature maps of the student, float [B, H, W, D].
      teacher_features: Feature maps of the teacher, float [B, H', W', D'], with any size and number of channels. They
        are never differentiated.

    Returns:
      A scalar of at least float32: the mean over the batch.

    Raises:
      TypeError: If the features are not floating point.
      ValueError: If the features do not have 4 dimensions, or if their batches differ.

    References:
      Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017,
      https://arxiv.org/abs/1707.01219, with the polynomial kernel of degree 2 and offset 0.
    """
    check_float("student_features", student_features, ndim=4)
    check_float("teacher_features", teacher_features, ndim=4)
    check_same_batch(student_features=student_features, teacher_features=teacher_features)
    student, teacher = pool_to_common_size(at_least_float32(student_features), at_least_float32(teacher_features))
    student, teacher = _patterns(student), lax.stop_gradient(_patterns(teacher))
    return _mean_kernel(teacher, teacher) + _mean_kernel(student, student) - 2 * _mean_kernel(student, teacher)


def _patterns(features):
    """Returns the patterns of the channels, unit rows [B, D, H W], of maps [B, H, W, D]."""
    batch, _, _, channels = features.shape
    return normalize(jnp.swapaxes(features.reshape(batch, -1, channels), 1, 2))


def _mean_kernel(a, b):
    """Returns the mean of <a_c, b_d>^2 over the samples and the pairs of channels."""
    pairs, positions = a.shape[1] * b.shape[1], a.shape[2]
    highest = lax.Precision.HIGHEST
    if positions**2 > pairs:
        return jnp.mean(jnp.square(jnp.einsum("bcp,bdp->bcd", a, b, precision=highest)))
    # sum over c, d of <a_c, b_d>^2 is the inner product of a^T a and b^T b, which are smaller when there are many
    # channels.
    a, b = (jnp.einsum("bcp,bcq->bpq", x, x, precision=highest) for x in (a, b))
    return jnp.sum(jnp.mean(a * b, axis=0)) / pairs


class NeuronSelectivityTransfer(Method):
    """Sums `nst_loss` over all stages."""

    version: ClassVar[int] = 2

    def __call__(self, inputs: LossInputs):
        stages = pair_stages(inputs.student.stages, inputs.teacher.stages)
        return sum(nst_loss(student, teacher) for student, teacher in stages), {}
