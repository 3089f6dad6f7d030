"""Scale decoupled distillation: logits of the regions of the last map, each compared separately."""

from collections.abc import Callable
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._arrays import average_pool
from cskd_jax.losses._checks import at_least_float32, check_averages_maps, check_float, check_labels, check_same_shape
from cskd_jax.losses.base import Head, LossInputs, Method, Positive
from cskd_jax.losses.dkd import dkd_loss
from cskd_jax.losses.logits import kd_loss

# The weight of a region in which the teacher is right although it is wrong on the whole map, or vice versa.
_COMPLEMENTARY = 2.0
# {setting: sides of the grids of regions}
_SCALES = {"1": (1,), "1,2": (1, 2), "1,2,4": (1, 2, 4)}
# The grid whose cells are averaged to form the larger regions.
_FINEST = 4

LogitsLoss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def region_logits(features: jax.Array, head: Head, scales: tuple[int, ...] = (1, 2, 4)) -> jax.Array:
    """Computes the logits of the regions of a map with the classifier of its network.

    The map is average-pooled to 4x4 cells, and these to the grid of each scale. If its height and width are divisible
    by 4, the region of scale 1 is the whole map, and its logits are those of the network.

    Args:
      features: Map before the network's pooling, float [B, H, W, D].
      head: Classifier of the network.
      scales: Sides of the grids, at most 4.

    Returns:
      Logits [B, N, C] of at least float32, with the N regions ordered grid by grid, and row by row within a grid.
    """
    check_float("features", features, ndim=4)
    cells = average_pool(at_least_float32(features), (_FINEST, _FINEST))
    grids = [average_pool(cells, (scale, scale)) for scale in scales]
    regions = jnp.concatenate([grid.reshape(len(grid), -1, grid.shape[-1]) for grid in grids], axis=1)
    return head(regions)


def region_weights(teacher_logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the weights of regions: 2 where the teacher is right on only one of region and whole map, else 1.

    Args:
      teacher_logits: Logits of the regions of the teacher, [B, N, C], the whole map first.
      labels: Labels, int [B].

    Returns:
      Weights [B, N].
    """
    right = jnp.argmax(teacher_logits, axis=2).astype(labels.dtype) == labels[:, None]
    return jnp.where(right == right[:, :1], 1.0, _COMPLEMENTARY).astype(teacher_logits.dtype)


def sdd_loss(student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array, loss: LogitsLoss) -> jax.Array:
    """Computes scale decoupled distillation: a loss of logits, weighted and averaged over the regions.

    The loss is 1/(B N) sum over i and n of w_in l(z^s_in, z^t_in, y_i) with the weights w of `region_weights`. Time and
    memory are O(B N C).

    Args:
      student_logits: Logits of the regions of the student, float [B, N, C] (see `region_logits`).
      teacher_logits: Logits of the regions of the teacher, float [B, N, C], never differentiated.
      labels: Labels, int [B], in [0, C).
      loss: Function l from logits of student and teacher [1, C] and labels [1], a batch of size one, to a scalar.

    Returns:
      A scalar of at least float32.

    Raises:
      TypeError: If the logits are not floating point, or the labels not integers.
      ValueError: If shapes do not fit.

    References:
      Wei, Luo, Luo, "Scale Decoupled Distillation", CVPR 2024, https://arxiv.org/abs/2403.13512; code:
      https://github.com/shicaiwei123/SDD-CVPR2024.
    """
    check_float("student_logits", student_logits, ndim=3)
    check_float("teacher_logits", teacher_logits, ndim=3)
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    check_labels(labels, len(student_logits))
    batch, regions, classes = student_logits.shape
    teacher_logits = lax.stop_gradient(at_least_float32(teacher_logits))
    students, teachers = (
        at_least_float32(logits).reshape(-1, 1, classes) for logits in (student_logits, teacher_logits)
    )
    losses = jax.vmap(loss)(students, teachers, jnp.repeat(labels, regions)[:, None]).reshape(batch, regions)
    return jnp.mean(region_weights(teacher_logits, labels) * losses)


class _ScaleDecoupled(Method):
    """Applies `sdd_loss` to the last maps, with the loss that `_compare` defines."""

    multilabel: ClassVar[bool] = False
    scales: Literal["1", "1,2", "1,2,4"] = "1,2,4"

    def __call__(self, inputs: LossInputs):
        check_averages_maps(student=inputs.student, teacher=inputs.teacher)
        student, teacher = (
            region_logits(output.features[-1], head, _SCALES[self.scales])
            for output, head in ((inputs.student, inputs.student_head), (inputs.teacher, inputs.teacher_head))
        )
        return sdd_loss(student, teacher, inputs.labels, self._compare), {}

    def _compare(self, student, teacher, labels):
        raise NotImplementedError


class SDDKD(_ScaleDecoupled):
    """Applies scale decoupled distillation to the last maps, with the loss of `kd` for each region.

    Attributes:
      scales: Sides of the grids of regions; "1,2,4" has 21 regions, "1,2" has 5, and "1" is the whole map alone.
      temperature: Temperature of the softmax, greater than 0.
    """

    temperature: Positive = 4.0

    def _compare(self, student, teacher, labels):
        del labels
        return kd_loss(student, teacher, temperature=self.temperature)


class SDDDKD(_ScaleDecoupled):
    """Applies scale decoupled distillation to the last maps, with the loss of `dkd` for each region.

    Attributes:
      scales: Sides of the grids of regions; "1,2,4" has 21 regions, "1,2" has 5, and "1" is the whole map alone.
      alpha: Weight of the target class against all others.
      beta: Weight of the distribution over the other classes.
      temperature: Temperature of the softmax, greater than 0.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: Positive = 4.0

    def _compare(self, student, teacher, labels):
        settings = {"alpha": self.alpha, "beta": self.beta, "temperature": self.temperature}
        return dkd_loss(student, teacher, labels, **settings)[0]


class SDDNKD(_ScaleDecoupled):
    """Applies scale decoupled distillation to the last maps, with a loss like that of NKD for each region.

    The loss is -q_y ln p_y - gamma T^2 sum over c of q'_c ln p'_c, with the softmax p of the student and q of the
    teacher, and p', q' the same with temperature T. The sum is over all classes, as in the authors' code; NKD leaves
    the label out of it.

    Attributes:
      scales: Sides of the grids of regions; "1,2,4" has 21 regions, "1,2" has 5, and "1" is the whole map alone.
      gamma: Weight of the second part.
      temperature: Temperature of the second part, greater than 0.
    """

    gamma: float = 1.5
    temperature: Positive = 1.0

    def _compare(self, student, teacher, labels):
        def at_label(x):
            return jnp.take_along_axis(x, labels[:, None], axis=1)[:, 0]

        target = -at_label(jax.nn.softmax(teacher)) * at_label(jax.nn.log_softmax(student))
        log_s = jax.nn.log_softmax(student / self.temperature)
        second = -jnp.sum(jax.nn.softmax(teacher / self.temperature) * log_s, axis=1)
        return jnp.mean(target + self.gamma * self.temperature**2 * second)
