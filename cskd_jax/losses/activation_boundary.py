"""Activation boundaries: the student learns which neurons are on, whatever their strength."""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._checks import at_least_float32, check_float, check_same_shape, pair_stages
from cskd_jax.losses._connectors import Regressor, pool_to_reachable_size
from cskd_jax.losses.base import FirstPhase, LossInputs, Method, Positive


def activation_boundary_loss(
    student_stages: Sequence[jax.Array], teacher_stages: Sequence[jax.Array], *, margin: float = 1.0
) -> jax.Array:
    """Computes the activation boundary loss, with a margin m around the boundaries.

    The loss is the sum over stages l = 1..L of 2^(l - L) 3 / (1000 B) sum of relu(s + m)^2 where t <= 0, relu(m - s)^2
    where t > 0: a neuron that is off in the teacher is pushed below -m, and one that is on is pushed above m. The inner
    sum is over all elements of the stage. The constant 3 / 1000 is from the reference code of CRD (Tian et al. 2020,
    https://github.com/HobbitLong/RepDistiller). Time and memory are O(B H W D) per stage.

    Args:
      student_stages: Pre-activations of the student, float [B, H_l, W_l, D_l], first stage first, mapped to the
        teacher's channels.
      teacher_stages: Pre-activations of the teacher in the same shapes. They are never differentiated; only their signs
        are read.
      margin: Margin m, greater than 0.

    Returns:
      A scalar of at least float32: the mean over the batch (B is the batch size of the arrays) of sums over the
      elements.

    Raises:
      TypeError: If a stage is not floating point.
      ValueError: If the numbers of stages or the shapes differ, or if the margin is not positive.

    References:
      Heo, Lee, Yun, Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", AAAI
      2019, https://arxiv.org/abs/1811.03233.
    """
    if not margin > 0:
        raise ValueError(f"margin must be greater than 0, got {margin}")
    total = 0.0
    for stage, (student, teacher) in enumerate(pair_stages(student_stages, teacher_stages), start=1):
        check_float(f"student stage {stage}", student, ndim=4)
        check_float(f"teacher stage {stage}", teacher, ndim=4)
        check_same_shape(student=student, teacher=teacher)
        on = lax.stop_gradient(teacher) > 0
        student = at_least_float32(student)
        violation = jnp.where(on, nn.relu(margin - student), nn.relu(margin + student))
        factor = 2.0 ** (stage - len(student_stages)) * 3 / (1000 * len(student))
        total += factor * jnp.sum(jnp.square(violation))
    return jnp.asarray(total)


class ActivationBoundary(Method):
    """Applies `activation_boundary_loss` to the pre-activations of all stages.

    Where the shapes differ, a trainable convolution with batch normalization maps the student's pre-activations to the
    size and the channels of the teacher's (see `_connectors.Regressor`). Where the teacher's map is larger, but not
    twice as large, both are average-pooled to a common size first. The paper uses the loss alone to initialize the
    student, which is then trained with cross-entropy.

    Attributes:
      margin: Margin by which a neuron is pushed below or above a boundary, greater than 0.
    """

    margin: Positive = 1.0
    version: ClassVar[int] = 2
    first_phase: ClassVar[FirstPhase | None] = FirstPhase(trains_network=True)

    @nn.compact
    def __call__(self, inputs: LossInputs):
        students, teachers = [], []
        pairs = pair_stages(inputs.student.preactivations, inputs.teacher.preactivations)
        for stage, (student, teacher) in enumerate(pairs, start=1):
            student, teacher = pool_to_reachable_size(student, teacher)
            if student.shape != teacher.shape:
                size = teacher.shape[1], teacher.shape[2]
                student = Regressor(teacher.shape[-1], size, self.axis_name, name=f"connector{stage}")(student)
            students.append(student)
            teachers.append(teacher)
        return activation_boundary_loss(students, teachers, margin=self.margin), {}
