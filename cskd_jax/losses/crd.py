"""Contrastive representation distillation: each sample is contrasted with a memory of all the others."""

import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._arrays import normalize
from cskd_jax.losses._batch import batch_positions, gather_batch
from cskd_jax.losses._checks import (
    at_least_float32,
    check_float,
    check_labels,
    check_same_batch,
    check_same_shape,
    check_temperature,
)
from cskd_jax.losses._connectors import Pointwise
from cskd_jax.losses.base import Count, Fraction, LossInputs, Method, Positive

# This number is added to the denominators inside the logarithms, as in the reference code.
_EPSILON = 1e-7


class ContrastMemory(NamedTuple):
    """The remembered embeddings and labels of the N samples of the training split; equal on all devices.

    Attributes:
      student: Running embeddings of the student, float [N, D], of norm 1; initially random directions.
      teacher: Running embeddings of the teacher, float [N, D], of norm 1; initially random directions.
      labels: Labels, int32 [N]; -1 until a sample has been in a batch.
      log_normalizers: ln(Z / N) for student and teacher, float [2]; -inf until the first batch has set them.
    """

    student: jax.Array
    teacher: jax.Array
    labels: jax.Array
    log_normalizers: jax.Array


def new_contrast_memory(key: jax.Array, num_examples: int, embedding_size: int, dtype=jnp.float32) -> ContrastMemory:
    """Returns the memory before the first step; raises ValueError if there are fewer than two samples to contrast."""
    if num_examples == 0:
        raise ValueError(
            "crd keeps a memory of every training image, so it cannot use batches made by a function: give train as "
            "arrays"
        )
    if num_examples < 2:
        raise ValueError(f"crd contrasts the examples of a training split: it needs at least 2, got {num_examples}")
    student, teacher = normalize(jax.random.normal(key, (2, num_examples, embedding_size), dtype))
    return ContrastMemory(student, teacher, jnp.full(num_examples, -1, jnp.int32), jnp.full(2, -jnp.inf, dtype))


def draw_negatives(key: jax.Array, positions: jax.Array, num_negatives: int, num_examples: int) -> jax.Array:
    """Draws samples of the training split to contrast with, uniformly and with replacement.

    Args:
      key: Key of the draws, the same on all devices.
      positions: Positions of the samples in the global batch, int [B]. The draw for a sample depends on `key` and its
        position alone.
      num_negatives: Number K of draws for each sample.
      num_examples: Size N of the training split.

    Returns:
      An array int32 [B, K] of values in [0, N).
    """

    def draw(position):
        return jax.random.randint(jax.random.fold_in(key, position), (num_negatives,), 0, num_examples, jnp.int32)

    return jax.vmap(draw)(positions)


def contrastive_loss(
    student_embedding: jax.Array,
    teacher_embedding: jax.Array,
    memory: ContrastMemory,
    labels: jax.Array,
    indices: jax.Array,
    negatives: jax.Array,
    *,
    temperature: float = 0.07,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Computes contrastive representation distillation: NCE of each network's embedding against the other's memory.

    For an anchor v of sample i (the student's embedding against the teacher's memory m, and the reverse)
      P(j) = exp(<v, m_j> / T) / Z,      S(j) = P(j) + K / N + 1e-7
      loss = -ln(P(i) / S(i)) - K mean over the allowed negatives j of ln(K / N / S(j))
    with the constant Z = N mean exp(<v, m_j> / T) over the anchors, positives and negatives of the first batch. The
    value is the sum over the two directions. A negative is allowed unless it is known to belong to the sample's own
    class: the mean times K stands for K draws from the allowed ones, and the negatives contribute 0 if none is allowed.
    The small number is from the reference code. The loss is computed from logarithms and is finite for any embeddings.

    Time is O(B N D): one matrix product with each memory, from which the scores of the negatives are picked. Memory is
    therefore O(B N) instead of the O(B K D) that collecting the embeddings of the negatives would take, on each device
    for its own samples.

    Args:
      student_embedding: Embeddings of the student, float [B, D], of norm 1. They are differentiated.
      teacher_embedding: Embeddings of the teacher, float [B, D], of norm 1. They are differentiated, because the linear
        layer that produces them is trained.
      memory: Memory of the training split, not differentiated. Its labels should already contain those of the global
        batch.
      labels: Labels, int [B].
      indices: Positions of the samples in the training split, int [B].
      negatives: Negatives from `draw_negatives`, int [B, K].
      temperature: Temperature T, greater than 0.
      axis_name: Name of the mapped axis (`jax.pmap`) over which the batch is split, static. Each device contrasts its
        own samples; only the estimate of Z uses the global batch.

    Returns:
      A scalar of at least float32, the mean over the local batch; the terms `student` and `teacher`, named after their
      anchors; and the memory's log_normalizers, estimated if they were -inf.

    Raises:
      TypeError: If the embeddings are not floating point, or the labels not integers.
      ValueError: If shapes do not fit, or if the temperature is not positive.

    References:
      Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, https://arxiv.org/abs/1910.10699,
      section 3 and its appendix on the memory buffer; reference code: https://github.com/HobbitLong/RepDistiller.
    """
    check_float("student_embedding", student_embedding, ndim=2)
    check_same_shape(student_embedding=student_embedding, teacher_embedding=teacher_embedding)
    check_same_shape(student_memory=memory.student, teacher_memory=memory.teacher)
    check_labels(labels, len(student_embedding))
    check_same_batch(student_embedding=student_embedding, indices=indices, negatives=negatives)
    check_temperature(temperature)
    student_embedding, teacher_embedding = at_least_float32(student_embedding), at_least_float32(teacher_embedding)
    memory = ContrastMemory(
        at_least_float32(memory.student),
        at_least_float32(memory.teacher),
        jnp.asarray(memory.labels),
        at_least_float32(memory.log_normalizers),
    )
    num_negatives, excess = negatives.shape[1], len(memory.student) * _EPSILON
    known_labels = memory.labels[negatives]
    allowed = (known_labels != labels[:, None]) & (negatives != indices[:, None])
    allowed = allowed.astype(student_embedding.dtype)
    weights = num_negatives * allowed / jnp.maximum(jnp.sum(allowed, axis=1, keepdims=True), 1)
    terms, log_normalizers = {}, []
    for i, (name, anchors, bank) in enumerate(
        (("student", student_embedding, memory.teacher), ("teacher", teacher_embedding, memory.student))
    ):
        scores = jnp.dot(anchors, lax.stop_gradient(bank).T, precision=lax.Precision.HIGHEST) / temperature
        positive = jnp.take_along_axis(scores, indices[:, None], axis=1)
        negative = jnp.take_along_axis(scores, negatives, axis=1)
        estimate = _log_mean_exp(positive, negative, weights, axis_name)
        known = lax.stop_gradient(memory.log_normalizers[i])
        log_normalizer = jnp.where(jnp.isneginf(known), estimate, known)
        shift = log_normalizer + math.log(num_negatives + excess)
        # The numerator of the negatives does not include the excess.
        negative_nce = jax.nn.softplus(negative - shift) + math.log1p(excess / num_negatives)
        nce = jax.nn.softplus(shift - positive[:, 0]) + jnp.sum(weights * negative_nce, axis=1)
        terms[name] = jnp.mean(nce)
        log_normalizers.append(log_normalizer)
    return terms["student"] + terms["teacher"], terms, jnp.stack(log_normalizers)


def _log_mean_exp(positive, negative, weights, axis_name):
    """Returns the log of the weighted mean of exponentials over the global batch; the positives have weight 1."""
    scores = lax.stop_gradient(jnp.concatenate([positive, negative], axis=1))
    weights = jnp.concatenate([jnp.ones_like(positive), weights], axis=1)
    logarithms = jax.nn.logsumexp(scores, axis=1, b=weights) - jnp.log(jnp.sum(weights, axis=1))
    logarithms = gather_batch(logarithms, axis_name)
    return jax.nn.logsumexp(logarithms) - math.log(len(logarithms))


def remember(
    memory: ContrastMemory,
    student_embedding: jax.Array,
    teacher_embedding: jax.Array,
    indices: jax.Array,
    *,
    momentum: float,
    axis_name: str | None = None,
) -> ContrastMemory:
    """Updates the memory with the global batch: m_i = normalize(momentum m_i + (1 - momentum) v_i).

    Args:
      memory: Memory of the N samples of the training split.
      student_embedding: Embeddings of the student, float [B, D], of norm 1.
      teacher_embedding: Embeddings of the teacher, float [B, D], of norm 1.
      indices: Distinct positions of the samples in the training split, int [B].
      momentum: Momentum of the remembered embeddings, in [0, 1).
      axis_name: Name of the mapped axis over which the batch is split. All devices write the whole global batch, so
        that their copies stay equal.

    Returns:
      The memory with new embeddings of the samples of the global batch.

    Raises:
      ValueError: If the momentum is out of range.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    indices = gather_batch(indices, axis_name)

    def updated(bank, embedding):
        embedding = gather_batch(lax.stop_gradient(embedding), axis_name)
        bank = jnp.asarray(bank)
        return bank.at[indices].set(normalize(momentum * bank[indices] + (1 - momentum) * embedding))

    student, teacher = updated(memory.student, student_embedding), updated(memory.teacher, teacher_embedding)
    return memory._replace(student=student, teacher=teacher)


class CRD(Method):
    """Applies `contrastive_loss` to trained linear embeddings of the pooled embeddings of both networks.

    The collection "memory" holds a `ContrastMemory`: 2 N D + N numbers, 51 MB for the 50,000 images of CIFAR and 1.3 GB
    for ImageNet. It is stored whole on every device, and with every checkpoint, because any sample may be drawn for any
    other. The work is split: each device contrasts its own samples, and a step gathers only the global batch to update
    all copies.

    Negatives are drawn uniformly, and those known to be of the sample's class are left out, so no list of the samples
    of each class is needed. Labels not seen yet are -1, so a negative may be of the same class in the first epoch, and
    only then.

    Attributes:
      embedding_size: Size of the linear embeddings.
      num_negatives: Number of negatives drawn for each sample, capped at the number of other samples in the training
        split.
      temperature: Temperature of the similarities, greater than 0.
      momentum: Momentum of the remembered embeddings.
    """

    embedding_size: Count = 128
    num_negatives: Count = 16384
    temperature: Positive = 0.07
    momentum: Fraction = 0.5
    multilabel: ClassVar[bool] = False
    version: ClassVar[int] = 2

    @nn.compact
    def __call__(self, inputs: LossInputs):
        if inputs.indices is None or inputs.key is None:
            raise ValueError("crd keeps a memory of the samples: it needs their indices and a key")
        student = self._embed("student", inputs.student.embedding)
        teacher = self._embed("teacher", lax.stop_gradient(inputs.teacher.embedding))
        variable = self.variable("memory", "contrast", self._new_memory, student.dtype)
        labels, indices, batch_size = inputs.labels, inputs.indices, len(inputs.labels)
        num_negatives = min(self.num_negatives, self.num_examples - 1)
        positions = batch_positions(batch_size, self.axis_name)
        negatives = self.draw(inputs.key, positions, num_negatives)
        memory = ContrastMemory(**variable.value)
        known = gather_batch(labels, self.axis_name).astype(jnp.int32)
        memory = memory._replace(labels=memory.labels.at[gather_batch(indices, self.axis_name)].set(known))
        value, terms, log_normalizers = contrastive_loss(
            student,
            teacher,
            memory,
            labels,
            indices,
            negatives,
            temperature=self.temperature,
            axis_name=self.axis_name,
        )
        if not self.is_initializing():
            memory = memory._replace(log_normalizers=log_normalizers)
            memory = remember(memory, student, teacher, indices, momentum=self.momentum, axis_name=self.axis_name)
            variable.value = memory._asdict()
        return value, terms

    def draw(self, key: jax.Array, positions: jax.Array, num_negatives: int) -> jax.Array:
        """Returns the negatives of the samples at `positions` in the global batch, int32 [B, num_negatives]."""
        return draw_negatives(key, positions, num_negatives, self.num_examples)

    def _embed(self, name, embedding):
        return normalize(Pointwise(self.embedding_size, use_bias=True, name=name)(embedding))

    def _new_memory(self, dtype):
        return new_contrast_memory(self.make_rng("params"), self.num_examples, self.embedding_size, dtype)._asdict()
