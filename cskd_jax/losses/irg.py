"""Instance relationship graph: samples are vertices, distances are edges, and both change between two stages."""

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._arrays import average_pool, pool_to_common_size
from cskd_jax.losses._batch import gather_batch
from cskd_jax.losses._checks import (
    at_least_float32,
    check_float,
    check_same_batch,
    check_several_samples,
    pair_stages,
)
from cskd_jax.losses.base import Count, LossInputs, Method
from cskd_jax.losses.logits import mse_logits_loss


def irg_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    student_maps: tuple[jax.Array, jax.Array],
    teacher_maps: tuple[jax.Array, jax.Array],
    student_embedding: jax.Array,
    teacher_embedding: jax.Array,
    *,
    vertex_weight: float = 0.1,
    edge_weight: float = 5.0,
    transformation_weight: float = 5.0,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes IRG: vertex_weight * vertex + edge_weight * edge + transformation_weight * transformation.

    - vertex = MSE(z^s, z^t) of the logits.
    - edge = the mean over the lower map, the upper map and the embedding of MSE(E^s, E^t), with E_ij = d_ij / max(d)
      and the squared distances d_ij = ||x_i - x_j||^2 between the samples (flattened) of the global batch.
    - transformation = MSE(v^s, v^t), with v_i = w_i / max(w) and w_i = ||P(upper_i) - P(lower_i)||^2, the squared
      distance that sample i moves from the lower to the upper map.

    The transformation is the paper's vertex transformation. The paper does not say how to subtract maps of different
    shapes: here P averages the larger height and width, and the larger number of channels, over equal cells
    (overlapping where sizes do not divide) down to the smaller, so that no parameters are needed and any two networks
    can be combined. The paper's edge transformation is left out, as in Knowledge-Distillation-Zoo
    (https://github.com/AberHu/Knowledge-Distillation-Zoo): it is a difference of edges that are already matched.

    With maps and embeddings of D numbers per sample, time is O(B^2 D) and memory O(B^2 + B D), on every device.

    Args:
      student_logits: Logits of the student, float [B, C].
      teacher_logits: Logits of the teacher, float [B, C]. No output of the teacher is differentiated.
      student_maps: Lower and upper maps of the student, each float [B, H, W, D] with its own H, W and D.
      teacher_maps: Lower and upper maps of the teacher, whose sizes may differ from the student's.
      student_embedding: Embeddings of the student, float [B, D].
      teacher_embedding: Embeddings of the teacher, float [B, D'].
      vertex_weight: Weight of vertex. The defaults of the three weights are those of Knowledge-Distillation-Zoo.
      edge_weight: Weight of edge.
      transformation_weight: Weight of transformation.
      axis_name: Name of the mapped axis (`jax.pmap`) over which the batch is split, static. Vertex is then the mean
        over the local samples; for the other terms the maps and embeddings of the global batch are gathered, so their
        values are the same on every device.

    Returns:
      A scalar and the unweighted terms `vertex`, `edge` and `transformation`: means over samples and classes, over the
      B^2 pairs (i = j included) and the three places, and over samples; at least float32. Where all distances at one of
      these places are 0, or as small as the rounding of the features, its relations are 0 with zero gradient.

    Raises:
      TypeError: If an input is not floating point.
      ValueError: If shapes do not fit, if batches differ, or if the global batch has one sample.

    References:
      Liu, Cao, Li, Yuan, Hu, Li, Duan, "Knowledge Distillation via Instance Relationship Graph", CVPR 2019, section 3.
    """
    for name, maps in (("student_maps", student_maps), ("teacher_maps", teacher_maps)):
        if len(maps) != 2:
            raise ValueError(f"{name} must hold the lower and the upper map, got {len(maps)} maps")
        for i, x in enumerate(maps):
            check_float(f"{name}[{i}]", x, ndim=4)
    check_float("student_embedding", student_embedding, ndim=2)
    check_float("teacher_embedding", teacher_embedding, ndim=2)
    student, teacher = (*student_maps, student_embedding), (*teacher_maps, teacher_embedding)
    names = ("lower map", "upper map", "embedding")
    check_same_batch(
        student_logits=student_logits,
        **{f"student {name}": x for name, x in zip(names, student, strict=True)},
        **{f"teacher {name}": x for name, x in zip(names, teacher, strict=True)},
    )
    vertex = mse_logits_loss(student_logits, teacher_logits)
    student, teacher = ([at_least_float32(x) for x in network] for network in (student, teacher))
    teacher = lax.stop_gradient(teacher)
    edges = [
        jnp.mean(jnp.square(_edges(s, axis_name) - _edges(t, axis_name))) for s, t in zip(student, teacher, strict=True)
    ]
    edge = jnp.asarray(sum(edges) / len(edges))
    movements = [_transformation(network[0], network[1], axis_name) for network in (student, teacher)]
    transformation = jnp.mean(jnp.square(movements[0] - movements[1]))
    total = vertex_weight * vertex + edge_weight * edge + transformation_weight * transformation
    return total, {"vertex": vertex, "edge": edge, "transformation": transformation}


def _edges(x, axis_name):
    """Returns the squared distances between samples of the global batch over their maximum: [B, ...] -> [B, B]."""
    x = gather_batch(x.reshape(x.shape[0], -1), axis_name)
    check_several_samples("irg_loss", len(x))
    rounding = jnp.square(jnp.finfo(x.dtype).eps) * jnp.max(jnp.sum(jnp.square(x), axis=1))
    # Distances do not depend on the origin, but the rounding error of their expansion into products does.
    x = x - jnp.mean(x, axis=0)
    gram = jnp.dot(x, x.T, precision=lax.Precision.HIGHEST)
    norms = jnp.diagonal(gram)
    squared = jnp.maximum(norms[:, None] + norms[None, :] - 2 * gram, 0)
    return _relative(jnp.where(jnp.eye(len(x), dtype=bool), 0, squared), rounding)


def _transformation(lower, upper, axis_name):
    """Returns the squared distance that each sample moves over the maximum of the global batch: two [B, ...] -> [B]."""
    channels = min(lower.shape[-1], upper.shape[-1])
    lower, upper = (_pool_channels(x, channels) for x in pool_to_common_size(lower, upper))
    rounding = jnp.sum(jnp.square(lower), axis=(1, 2, 3)) + jnp.sum(jnp.square(upper), axis=(1, 2, 3))
    rounding = jnp.square(jnp.finfo(lower.dtype).eps) * jnp.max(gather_batch(rounding, axis_name))
    return _relative(gather_batch(jnp.sum(jnp.square(upper - lower), axis=(1, 2, 3)), axis_name), rounding)


def _pool_channels(x, channels):
    batch, height, width, _ = x.shape
    pooled = average_pool(x.reshape(batch, height * width, -1, 1), (height * width, channels))
    return pooled.reshape(batch, height, width, channels)


def _relative(distances, rounding):
    """Returns `distances` over their maximum; 0 where the maximum is no more than `rounding`."""
    largest = jnp.max(distances)
    coincide = largest <= lax.stop_gradient(rounding)
    return jnp.where(coincide, 0, distances / jnp.where(coincide, 1, largest))


class IRG(Method):
    """Applies `irg_loss` to the logits, the maps of two stages and the pooled embeddings.

    Attributes:
      lower_stage: Stage of the lower map, counted from 1.
      upper_stage: Stage of the upper map, greater than `lower_stage`.
      vertex_weight: Weight of the vertices, the logits.
      edge_weight: Weight of the edges, the distances between samples.
      transformation_weight: Weight of the transformations, the distances between the two maps of a sample.
    """

    lower_stage: Count = 2
    upper_stage: Count = 3
    vertex_weight: float = 0.1
    edge_weight: float = 5.0
    transformation_weight: float = 5.0

    def __call__(self, inputs: LossInputs):
        student, teacher = inputs.student, inputs.teacher
        pairs = pair_stages(student.features, teacher.features)
        if not 1 <= self.lower_stage < self.upper_stage <= len(pairs):
            raise ValueError(
                f"lower_stage {self.lower_stage} and upper_stage {self.upper_stage} must be two stages, in order, of "
                f"both networks, which have {len(pairs)} stages"
            )
        student_maps, teacher_maps = zip(pairs[self.lower_stage - 1], pairs[self.upper_stage - 1], strict=True)
        return irg_loss(
            student.logits,
            teacher.logits,
            student_maps,
            teacher_maps,
            student.embedding,
            teacher.embedding,
            vertex_weight=self.vertex_weight,
            edge_weight=self.edge_weight,
            transformation_weight=self.transformation_weight,
            axis_name=self.axis_name,
        )
