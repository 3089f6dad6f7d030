"""Relational knowledge distillation: the student learns distances between samples and angles among them."""

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._arrays import safe_rsqrt
from cskd_jax.losses._batch import gather_batch
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_batch, check_several_samples
from cskd_jax.losses.base import LossInputs, Method

# Squared distances are clipped from below to this value, so that coinciding samples are 1e-6 apart and have no
# gradient.
_SMALLEST_SQUARED_DISTANCE = 1e-12
# Largest number of elements in an array that a block of anchors needs: 16 MiB in float32.
_BLOCK_ELEMENTS = 2**22


def rkd_loss(
    student_embedding: jax.Array,
    teacher_embedding: jax.Array,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes relational knowledge distillation: distance_weight * distance + angle_weight * angle.

    distance = mean over (i, j) of h(d^s_ij / m^s - d^t_ij / m^t), with d_ij = ||x_i - x_j|| and m its mean over i != j.
    angle = mean over (i, j, k) of h(cos^s_ijk - cos^t_ijk), with cos_ijk the cosine of the angle at x_i between x_j and
    x_k, or 0 where one of them coincides with x_i. h is the smooth L1 function: x^2 / 2 for |x| < 1, else |x| - 1/2.

    The angles come from the squared distances by the law of cosines, so that they cost no product of embeddings: time
    is O(B^2 (D + D') + B^3). Anchors x_i are processed in blocks, and recomputed in the backward pass: memory is O(B^2
    + B (D + D')) plus, for a block, 2^22 numbers or as many as one anchor needs.

    Args:
      student_embedding: Embeddings of the student, float [B, D].
      teacher_embedding: Embeddings of the teacher, float [B, D'], never differentiated.
      distance_weight: Weight of the distances.
      angle_weight: Weight of the angles.
      axis_name: Name of the mapped axis (`jax.pmap`) over which the batch is split, static. The embeddings of the
        global batch are gathered, so the value is the same on every device.

    Returns:
      A scalar and the unweighted terms `distance` and `angle`, means over all B^2 pairs and B^3 triples of the global
      batch (i = j and so on included), of at least float32. Samples that coincide have no gradient through their
      distance or through angles at one of them toward the other.

    Raises:
      TypeError: If the embeddings are not floating point.
      ValueError: If the embeddings do not have 2 dimensions, if their batches differ, or if the global batch has one
        sample.

    References:
      Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, https://arxiv.org/abs/1904.05068, with the
      weights of section 4.
    """
    check_float("student_embedding", student_embedding, ndim=2)
    check_float("teacher_embedding", teacher_embedding, ndim=2)
    check_same_batch(student_embedding=student_embedding, teacher_embedding=teacher_embedding)
    student = gather_batch(at_least_float32(student_embedding), axis_name)
    teacher = lax.stop_gradient(gather_batch(at_least_float32(teacher_embedding), axis_name))
    check_several_samples("rkd_loss", len(student))
    student, teacher = _squared_distances(student), _squared_distances(teacher)
    distance = jnp.mean(_smooth_l1(_relative_distances(student) - _relative_distances(teacher)))
    angle = _mean_angle_difference(student, teacher)
    return distance_weight * distance + angle_weight * angle, {"distance": distance, "angle": angle}


def _over_anchors(function, anchors, elements):
    """Maps `function` over anchors in blocks, keeping nothing for the gradient.

    Args:
      function: Function of one anchor.
      anchors: Arrays whose first axis indexes the anchors.
      elements: Number of elements that the function needs for one anchor, which bounds the size of a block.

    Returns:
      The values of the function, stacked along the first axis.
    """
    block = max(1, _BLOCK_ELEMENTS // elements)
    return lax.map(jax.checkpoint(function), anchors, batch_size=block)


def _squared_distances(x):
    """Returns squared distances [B, B] of x [B, D].

    They are computed from the differences, so they are exactly 0 for samples that coincide, unlike |a|^2 + |b|^2 - 2ab.
    """
    return _over_anchors(lambda anchor: jnp.sum(jnp.square(x - anchor), axis=1), x, x.size)


def _relative_distances(squared):
    """Returns the distances divided by the mean of those between two different samples."""
    batch = len(squared)
    distances = jnp.sqrt(jnp.maximum(squared, _SMALLEST_SQUARED_DISTANCE))
    distances = jnp.where(jnp.eye(batch, dtype=bool), 0, distances)
    return distances * (batch * (batch - 1) / jnp.sum(distances))


def _mean_angle_difference(student, teacher):
    """Returns the mean of h(cos^s_ijk - cos^t_ijk) over all triples, from the squared distances."""

    def at_anchor(rows):
        difference = _cosines(rows[0], student) - _cosines(rows[1], teacher)
        return jnp.mean(_smooth_l1(difference))

    return jnp.mean(_over_anchors(at_anchor, (student, teacher), student.size))


def _cosines(row, squared):
    """Returns cos_ijk [B, B] of one anchor i: (d_ij^2 + d_ik^2 - d_jk^2) / (2 d_ij d_ik)."""
    inverse = safe_rsqrt(row)
    return (row[:, None] + row[None, :] - squared) * (inverse[:, None] * inverse[None, :]) / 2


def _smooth_l1(x):
    size = jnp.abs(x)
    return jnp.where(size < 1, jnp.square(x) / 2, size - 0.5)


class RKD(Method):
    """Applies `rkd_loss` to the pooled embeddings.

    Attributes:
      distance_weight: Weight of the distances between pairs of samples.
      angle_weight: Weight of the angles between triples of samples.
    """

    distance_weight: float = 25.0
    angle_weight: float = 50.0

    def __call__(self, inputs: LossInputs):
        return rkd_loss(
            inputs.student.embedding,
            inputs.teacher.embedding,
            distance_weight=self.distance_weight,
            angle_weight=self.angle_weight,
            axis_name=self.axis_name,
        )
