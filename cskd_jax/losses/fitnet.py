"""Hints: the student learns to reproduce the maps of a middle stage."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._checks import at_least_float32, check_float, check_same_shape, pair_stages
from cskd_jax.losses._connectors import Regressor, pool_to_reachable_size
from cskd_jax.losses.base import Count, LossInputs, Method


def hint_loss(student_features: jax.Array, teacher_features: jax.Array) -> jax.Array:
    """Computes the hint loss of FitNets: the mean squared difference between regressed student and teacher maps.

    Time is O(B H W D), and no memory is needed beyond the arguments.

    Args:
      student_features: Features of the student after the regressor, float [B, ..., D].
      teacher_features: Features of the teacher, float, in the shape of student_features, never differentiated.

    Returns:
      A scalar of at least float32: the mean over all elements.

    Raises:
      TypeError: If the features are not floating point.
      ValueError: If shapes differ.

    References:
      Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, https://arxiv.org/abs/1412.6550, Eq. 3, with the
      mean square instead of half the squared norm, as in the reference code of CRD (Tian et al. 2020,
      https://github.com/HobbitLong/RepDistiller).
    """
    check_float("student_features", student_features, min_ndim=2)
    check_float("teacher_features", teacher_features, min_ndim=2)
    check_same_shape(student_features=student_features, teacher_features=teacher_features)
    difference = at_least_float32(student_features) - lax.stop_gradient(at_least_float32(teacher_features))
    return jnp.mean(jnp.square(difference))


class FitNet(Method):
    """Applies `hint_loss` to one stage through a trainable regressor: convolution, batch normalization, ReLU.

    The convolution maps the student's map to the size of the teacher's (see `_connectors.Regressor`). Where the
    teacher's map is larger, but not twice as large, both are average-pooled to a common size instead.

    Attributes:
      stage: Stage of student and teacher, counted from 1.
    """

    stage: Count = 2
    version: ClassVar[int] = 2

    @nn.compact
    def __call__(self, inputs: LossInputs):
        pairs = pair_stages(inputs.student.stages, inputs.teacher.stages)
        if not 1 <= self.stage <= len(pairs):
            raise ValueError(f"stage must be from 1 to {len(pairs)}, the number of stages, got {self.stage}")
        student, teacher = pool_to_reachable_size(*pairs[self.stage - 1])
        regressor = Regressor(teacher.shape[-1], (teacher.shape[1], teacher.shape[2]), self.axis_name, name="regressor")
        return hint_loss(nn.relu(regressor(student)), teacher), {}
