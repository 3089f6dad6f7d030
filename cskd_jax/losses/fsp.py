"""Flow of solution procedure: the student learns how the channels of one stage relate to those of the next."""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._arrays import pool_to_common_size
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_batch, pair_stages
from cskd_jax.losses._connectors import Pointwise
from cskd_jax.losses.base import FirstPhase, LossInputs, Method


def fsp_matrix(first: jax.Array, second: jax.Array) -> jax.Array:
    """Computes the FSP matrix G: the mean over the positions of f_l (x) f_{l+1}.

    The larger of the two maps is average-pooled to the size of the smaller.

    Args:
      first: Map f_l, float [B, H, W, D].
      second: Map f_{l+1}, float [B, H', W', D'].

    Returns:
      G [B, D, D'], of at least float32.
    """
    first, second = pool_to_common_size(at_least_float32(first), at_least_float32(second))
    positions = first.shape[1] * first.shape[2]
    return jnp.einsum("bhwi,bhwj->bij", first, second, precision=lax.Precision.HIGHEST) / positions


def fsp_loss(student_stages: Sequence[jax.Array], teacher_stages: Sequence[jax.Array]) -> jax.Array:
    """Computes the FSP loss: the sum over consecutive stages l, l + 1 of the mean of (G_l^s - G_l^t)^2.

    G is computed by `fsp_matrix`. Time is O(B H W D D') and memory O(B D D') for each pair of stages.

    Args:
      student_stages: Maps of the student, float [B, H_l, W_l, D_l] for at least two stages, first stage first.
      teacher_stages: Maps of the teacher, [B, H'_l, W'_l, D_l], for the same number of stages, with the same numbers of
        channels and any size. They are never differentiated.

    Returns:
      A scalar of at least float32; the mean is over the B D_l D_{l+1} elements of a matrix.

    Raises:
      TypeError: If a stage is not floating point.
      ValueError: If stages do not have 4 dimensions, if their batches differ, if the numbers of stages differ or are
        less than two, or if student and teacher have different numbers of channels in a stage.

    References:
      Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation", CVPR 2017, https://doi.org/10.1109/CVPR.2017.754, Eq. 1
      and 2.
    """
    for stage, (student, teacher) in enumerate(pair_stages(student_stages, teacher_stages, at_least=2), start=1):
        check_float(f"student stage {stage}", student, ndim=4)
        check_float(f"teacher stage {stage}", teacher, ndim=4)
        check_same_batch(student=student, teacher=teacher)
        if student.shape[-1] != teacher.shape[-1]:
            raise ValueError(
                f"stage {stage} must have the same number of channels in student and teacher, "
                f"got student {student.shape}, teacher {teacher.shape}"
            )
    student_stages = [at_least_float32(stage) for stage in student_stages]
    teacher_stages = [lax.stop_gradient(at_least_float32(stage)) for stage in teacher_stages]
    pairs = zip(pairwise(student_stages), pairwise(teacher_stages), strict=True)
    differences = (fsp_matrix(*student) - fsp_matrix(*teacher) for student, teacher in pairs)
    return jnp.asarray(sum(jnp.mean(jnp.square(difference)) for difference in differences))


class FSP(Method):
    """Applies `fsp_loss` to all pairs of consecutive stages, with the stem as the first.

    The stem is left out if either network does not provide its map. The paper uses the loss alone to initialize the
    student, which is then trained with cross-entropy. A trainable 1x1 convolution without bias first projects any stage
    of the student whose number of channels differs from the teacher's; the paper and the reference code of CRD (Tian et
    al. 2020, https://github.com/HobbitLong/RepDistiller) only use networks with equal channels.
    """

    version: ClassVar[int] = 2
    first_phase: ClassVar[FirstPhase | None] = FirstPhase(trains_network=True)

    @nn.compact
    def __call__(self, inputs: LossInputs):
        pairs = list(enumerate(pair_stages(inputs.student.stages, inputs.teacher.stages), start=1))
        if inputs.student.stem is not None and inputs.teacher.stem is not None:
            pairs.insert(0, (0, (inputs.student.stem, inputs.teacher.stem)))
        stages = []
        for stage, (student, teacher) in pairs:
            if student.shape[-1] != teacher.shape[-1]:
                student = Pointwise(teacher.shape[-1], name=f"projection{stage}")(student)
            stages.append(student)
        return fsp_loss(stages, [teacher for _, (_, teacher) in pairs]), {}
