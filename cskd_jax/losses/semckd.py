"""Semantic calibration: every stage of the student learns from all stages of the teacher, weighted by attention."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._arrays import normalize, pool_to_common_size
from cskd_jax.losses._batch import count_batch, gather_batch
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_batch, check_same_shape, check_temperature
from cskd_jax.losses._connectors import Connector, Pointwise
from cskd_jax.losses.base import Count, LossInputs, Method, Positive


def semckd_attention(queries: jax.Array, keys: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """Computes how much each stage of the student attends to each stage of the teacher, for each sample.

    Args:
      queries: Queries of the S stages of the student, float [B, S, D], of norm 1.
      keys: Keys of the R stages of the teacher, float [B, R, D], of norm 1.
      temperature: Temperature of the softmax, greater than 0.

    Returns:
      An array [B, S, R] of at least float32: the softmax over R of <q, k> / temperature.

    Raises:
      TypeError: If queries or keys are not floating point.
      ValueError: If shapes do not fit, or if the temperature is not positive.
    """
    check_float("queries", queries, ndim=3)
    check_float("keys", keys, ndim=3)
    check_same_batch(queries=queries, keys=keys)
    check_temperature(temperature)
    queries, keys = at_least_float32(queries), at_least_float32(keys)
    return jax.nn.softmax(jnp.einsum("bsd,brd->bsr", queries, keys, precision=lax.Precision.HIGHEST) / temperature)


def semckd_loss(attention: jax.Array, errors: jax.Array) -> jax.Array:
    """Computes semantic calibration: the mean over samples and stages s of the sum over r of attention * error.

    Args:
      attention: Attention of stage s of the student to stage r of the teacher, float [B, S, R]. It is differentiated.
      errors: Mean squared errors between stage s of the student, mapped to the shape of stage r of the teacher, and
        stage r, float [B, S, R].

    Returns:
      A scalar of at least float32: the mean over the local batch.

    Raises:
      TypeError: If an argument is not floating point.
      ValueError: If shapes differ.

    References:
      Chen, Mei, Zhang, Wang, Wang, Feng, Chen, "Cross-Layer Distillation with Semantic Calibration", AAAI 2021,
      https://arxiv.org/abs/2012.03236; code: https://github.com/DefangChen/SimKD.
    """
    check_float("attention", attention, ndim=3)
    check_float("errors", errors, ndim=3)
    check_same_shape(attention=attention, errors=errors)
    return jnp.mean(jnp.sum(at_least_float32(attention) * at_least_float32(errors), axis=2))


class CrossLayers(nn.Module):
    """Layers that relate all stages of the student to all stages of the teacher.

    The query of a stage is made by two linear layers from the products of a sample's map with the maps of all samples
    of the batch, so they have as many inputs as the batch has samples. Keys are made in the same way from the teacher's
    maps.

    Attributes:
      width: Number of samples that a query is made from. A smaller batch is treated as if the missing samples had
        products of 0 with the others.
      factor: Factor by which the size of a query is smaller than `width`.
      temperature: Temperature of the attention.
      axis_name: Name of the mapped axis over which the batch is split, or None. The maps of the global batch are
        gathered; each device makes the queries and errors of its own samples.
    """

    width: int
    factor: int = 4
    temperature: float = 1.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, students: list[jax.Array], teachers: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Maps lists of S and R maps [B, H, W, D] to attention and errors, [B, S, R]."""
        queries = [self._embed(f"query{stage}", x) for stage, x in enumerate(students, start=1)]
        keys = [self._embed(f"key{stage}", x) for stage, x in enumerate(teachers, start=1)]
        attention = semckd_attention(jnp.stack(queries, 1), jnp.stack(keys, 1), temperature=self.temperature)
        errors = [
            jnp.stack([self._error(f"value{s}_{r}", x, y) for r, y in enumerate(teachers, start=1)], 1)
            for s, x in enumerate(students, start=1)
        ]
        return attention, jnp.stack(errors, 1)

    def _embed(self, name, features):
        rows = at_least_float32(features.reshape(len(features), -1))
        columns = gather_batch(rows, self.axis_name)
        missing = self.width - len(columns)
        if missing < 0:
            raise ValueError(f"semckd was created for batches of {self.width} samples, got {len(columns)}")
        products = jnp.dot(rows, columns.T, precision=lax.Precision.HIGHEST)
        products = jnp.pad(products, ((0, 0), (0, missing)))
        size = max(1, self.width // self.factor)
        hidden = nn.relu(Pointwise(2 * size, use_bias=True, name=f"{name}_layer1")(products))
        return normalize(Pointwise(size, use_bias=True, name=f"{name}_layer2")(hidden))

    def _error(self, name, student, teacher):
        student, teacher = pool_to_common_size(student, teacher)
        channels = teacher.shape[-1]
        student = nn.relu(Connector(2 * channels, axis_name=self.axis_name, name=f"{name}_layer1")(student))
        student = nn.relu(Connector(2 * channels, 3, self.axis_name, name=f"{name}_layer2")(student))
        student = Pointwise(channels, name=f"{name}_layer3")(student)
        return jnp.mean(jnp.square(student - at_least_float32(teacher)), axis=(1, 2, 3))


class SemCKD(Method):
    """Applies `semckd_loss` to all stages of both networks, whose numbers may differ, through `CrossLayers`.

    The authors' networks for queries and keys are as wide as the batch is large, and they leave out the smaller last
    batch of an epoch. Here a smaller batch is padded with samples that have nothing in common with the others. With
    micro-batches, the width is the size of a micro-batch. A different batch size needs different parameters, so it is a
    different run.

    Attributes:
      temperature: Temperature of the attention, greater than 0.
      factor: Factor by which the size of queries and keys is smaller than the batch size.
    """

    temperature: Positive = 1.0
    factor: Count = 4

    @nn.compact
    def __call__(self, inputs: LossInputs):
        students, teachers = list(inputs.student.stages), lax.stop_gradient(list(inputs.teacher.stages))
        for features in (*students, *teachers):
            check_float("a stage", features, ndim=4)
        width = self.batch_size or count_batch(students[0], self.axis_name)
        layers = CrossLayers(width, self.factor, self.temperature, self.axis_name, name="cross_layers")
        return semckd_loss(*layers(students, teachers)), {}
