"""Category structure: how samples lie around their category's center, and how the centers relate to each other.

"The paper" below is Chen, Zheng, Shen, Zeng, Zhou, Zhao, "Improving Knowledge Distillation via Category Structure",
ECCV 2020. "The released code" is the code that its authors released, https://github.com/xeanzheng/CSKD. The two differ;
both are implemented here, as separately named variants.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from cskd_jax.losses._arrays import pool_to_common_size, rounding_of_difference, safe_sqrt
from cskd_jax.losses._batch import gather_batch, sum_batch
from cskd_jax.losses._checks import at_least_float32, check_float, check_labels, check_logits, check_same_shape
from cskd_jax.losses.base import Fraction, LossInputs, Method

# {variant: default (intra_weight, inter_weight, compactness_weight)}; those of "paper" are from its section 4.1.
VARIANT_WEIGHTS = {"paper": (0.01, 0.2, 0.0), "reference": (0.002, 0.04, 0.1)}


class CategoryIndex(NamedTuple):
    """The categories of the global batch, and the samples that belong to each.

    At most K = min(global batch size, num_classes) categories can occur in a batch, so every array with one row per
    category has K rows ("slots"), no matter how many classes there are.

    Attributes:
      slots: Slot of each sample of this device, int32 [B], in [0, K).
      counts: Number of samples of the global batch in each slot, float32 [K]; 0 for a slot that no category uses.
      categories: Category of each slot, int32 [K]; meaningless for a slot that no category uses.
    """

    slots: jax.Array
    counts: jax.Array
    categories: jax.Array

    @property
    def present(self) -> jax.Array:
        """Returns whether each slot holds a category of this batch, bool [K]."""
        return self.counts > 0


def category_index(labels: jax.Array, *, num_classes: int, axis_name: str | None = None) -> CategoryIndex:
    """Assigns the labels of a batch to at most min(global batch size, num_classes) slots.

    Args:
      labels: Labels, int [B], in [0, num_classes).
      num_classes: Number of classes, static.
      axis_name: Name of the mapped axis over which the global batch is split, or None on one device.

    Returns:
      The `CategoryIndex` of the global batch.
    """
    global_batch = labels.shape[0] * (1 if axis_name is None else lax.axis_size(axis_name))
    num_slots = min(global_batch, num_classes)
    labels = labels.astype(jnp.int32)  # a narrower type may not hold the number of slots
    slots, categories = labels, jnp.arange(num_slots, dtype=jnp.int32)
    if num_slots < num_classes:
        # A category takes the slot of its first sample in the batch.
        categories = gather_batch(labels, axis_name)
        same = labels[:, None] == categories
        slots = jnp.min(jnp.where(same, jnp.arange(num_slots, dtype=jnp.int32), num_slots), axis=1)
    counts = _segment_sum(jnp.ones(labels.shape, jnp.float32), slots, num_slots, axis_name)
    return CategoryIndex(slots, counts, categories)


def category_centers(
    features: jax.Array, index: CategoryIndex, *, mask: jax.Array | None = None, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Computes the centers of the categories: C_i = mean of F_j over the samples j with y_j = i (paper, Eq. 6).

    Args:
      features: Features, float [B, D].
      index: Index of the global batch from `category_index`.
      mask: Samples that count, bool [B]; the others are left out of their center. None means all.
      axis_name: Name of the mapped axis over which the global batch is split, or None on one device.

    Returns:
      The centers [K, D] of the global batch, zero where no sample counts, and the number [K] of samples that count in
      each; both of at least float32.
    """
    sums, counts = _category_sums(at_least_float32(features), index, mask=mask, axis_name=axis_name)
    return _means(sums, counts), counts


def _category_sums(features, index, *, mask=None, axis_name=None):
    """Returns the sums from which `category_centers` computes the means, and the numbers of samples."""
    num_slots = index.counts.shape[0]
    slots, counts = index.slots, index.counts
    if mask is not None:
        # Samples past the last slot are dropped, so no masked copy of the features is needed.
        slots = jnp.where(mask, slots, num_slots)
        counts = _segment_sum(mask.astype(counts.dtype), index.slots, num_slots, axis_name)
    return _segment_sum(features, slots, num_slots, axis_name), counts


def _means(sums, counts):
    return sums / jnp.where(counts > 0, counts, 1).astype(sums.dtype)[:, None]


def intra_category_structure(features: jax.Array, centers: jax.Array, counts: jax.Array, slots: jax.Array) -> jax.Array:
    """Computes the deviation of each sample from the center of its category: Psi(F^i) = {F_j - C_i} (paper, Eq. 7).

    The center is not differentiated. For the paper's term this changes no gradient (deviations sum to zero within a
    category, so the center's share of the gradient vanishes); the released code detaches it as well.

    Args:
      features: Features, float [B, D].
      centers: Centers from `category_centers`, float [K, D].
      counts: Numbers of samples from `category_centers`, float [K]. A sample whose category has count 0 is its own
        center: its deviation is 0, but the gradient flows through the sample.
      slots: Slot of each sample, int [B].

    Returns:
      Deviations [B, D], of at least float32.
    """
    features, centers = at_least_float32(features), at_least_float32(centers)
    own = jnp.where((counts > 0)[slots][:, None], centers[slots], features)
    return features - lax.stop_gradient(own)


def inter_category_structure(centers: jax.Array) -> jax.Array:
    """Computes the cosine of each pair of centers: M(i, k) = <C_i, C_k> / (||C_i|| ||C_k||) (paper, Eq. 8).

    Time is O(K^2 D), and memory O(K^2) beyond the centers.

    Args:
      centers: Centers, float [K, D].

    Returns:
      M [K, K], of at least float32. The diagonal is 1; rows and columns of centers that are zero (absent categories
      among them) are 0, and their gradient is 0. A norm so small that its derivative would overflow (4e-12 in float32)
      counts as zero.
    """
    gram = _gram(at_least_float32(centers))
    squared_norms = jnp.diagonal(gram)
    nonzero = squared_norms > float(jnp.finfo(gram.dtype).tiny) ** 0.6
    inverse_norms = jnp.where(nonzero, lax.rsqrt(jnp.where(nonzero, squared_norms, 1)), 0)
    cosines = gram * inverse_norms[:, None] * inverse_norms[None, :]
    # The diagonal is exactly 1: the norm of a difference of two such matrices has a steep gradient near 0.
    return jnp.where(jnp.eye(len(centers), dtype=bool), nonzero.astype(cosines.dtype), cosines)


@partial(jax.jit, static_argnames=("num_classes", "variant", "filter_misclassified", "axis_name"))
def category_structure_loss(
    student_features: jax.Array,
    teacher_features: jax.Array,
    labels: jax.Array,
    *,
    num_classes: int,
    student_logits: jax.Array | None = None,
    teacher_logits: jax.Array | None = None,
    variant: str = "paper",
    intra_weight: float | None = None,
    inter_weight: float | None = None,
    compactness_weight: float | None = None,
    filter_misclassified: bool | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the category-structure loss: intra-category plus inter-category structure.

    With deviations Psi (Eq. 7), cosines of centers M (Eq. 8), K categories present in the batch, features f of one
    sample flattened to D numbers (D = H W D' for maps [B, H, W, D']), the center P of the sample's category, and the
    center Z of its logits z:

    variant "paper" (Eq. 9; the norms are not squared)
      intra_feature = 1/K sum_i || Psi(F^it) - Psi(F^is) ||_2      inter_feature = || M^t - M^s ||_2
    variant "reference" (released code)
      intra_feature = MSE(f^t - P^t, f^s - stop_gradient(P^s)) / D   inter_feature = mean (M^t - M^s)^2 / K
      intra_logits = MSE(z^t - Z^t, z^s - stop_gradient(Z^s)) / C    inter_logits = the same as inter_feature, on z
      compactness = MSE(z^s, stop_gradient(Z^s))

    intra = intra_weight (intra_feature + intra_logits) + compactness_weight compactness
    inter = inter_weight (inter_feature + inter_logits),      category = intra + inter, where absent terms count 0.

    Time is O(B D + K^2 D) and memory O(B D + K^2) with K <= min(B, num_classes): the number of classes matters only for
    the logits themselves. Values and gradients are finite for absent categories, categories with one sample, zero
    features, and networks that misclassify everything. In variant "paper" a difference counts as rounding, and so as
    exactly 0, if it is at most 8 eps times the norm of what is subtracted (eps is the machine epsilon of the dtype): a
    norm that is not squared would have a full-size gradient there.

    Args:
      student_features: Features of the student after sigma (projected to the teacher's channels), float [B, ..., D'].
      teacher_features: Features of the teacher, float, in the shape of student_features, never differentiated.
      labels: Labels, int [B], in [0, num_classes).
      num_classes: Number of classes, static.
      student_logits: Logits of the student, float [B, C], needed for the logit terms of "reference" and for its filter;
        "paper" does not use them.
      teacher_logits: Logits of the teacher, float [B, C], given together with student_logits, never differentiated.
      variant: Variant of the loss, "paper" or "reference", static.
      intra_weight: Weight of the intra-category terms; None is 0.01 for "paper" (its beta) and 0.002 for "reference".
      inter_weight: Weight of the inter-category terms; None is 0.2 for "paper" (its gamma) and 0.04 for "reference".
      compactness_weight: Weight of compactness, for "reference" only; None is 0.1.
      filter_misclassified: Whether the centers of intra_feature use only the samples that each network itself
        classifies correctly, for "reference" only, static. A category with no such sample has each sample as its own
        center. None is True for "reference". False allows "reference" without logits, whose terms are then left out.
      axis_name: Name of the mapped axis (`jax.pmap`) over which the batch is split, static. Means over the batch are
        then taken over the local samples, and relations over the global batch, so that the mean of the loss and of its
        gradients over devices equals the loss and the gradient of the global batch on one device.

    Returns:
      The scalar category, and a dict of scalars: the unweighted terms above, and `intra`, `inter`, `category`. They are
      computed in float32, or in float64 where the inputs are float64.

    Raises:
      TypeError: If features or logits are not floating point, or the labels not integers.
      ValueError: If shapes do not fit, if the variant is unknown, if "reference" lacks logits that it needs, or if an
        argument is given that the variant does not take.

    References:
      Chen et al., ECCV 2020, https://doi.org/10.1007/978-3-030-58604-1_13, Eq. 6 to 9.
    """
    value, terms, _ = _category_structure(
        student_features,
        teacher_features,
        labels,
        num_classes=num_classes,
        logits=(student_logits, teacher_logits),
        variant=variant,
        weights=(intra_weight, inter_weight, compactness_weight),
        filter_misclassified=filter_misclassified,
        axis_name=axis_name,
    )
    return value, terms


class RunningCenters(NamedTuple):
    """Exponential moving averages of the centers of all categories; equal on all devices.

    They are bias-corrected like the moments of Adam: a center is an average over the batches that contained the
    category, however few there were.

    Attributes:
      student: Centers of the student, float [C, D]; 0 for a category not seen yet.
      teacher: Centers of the teacher, float [C, D]; 0 for a category not seen yet.
      weights: Moving average of ones that starts at 0, for each category, float [C].
    """

    student: jax.Array
    teacher: jax.Array
    weights: jax.Array

    @classmethod
    def zeros(cls, num_classes: int, size: int, dtype=jnp.float32):
        """Returns the centers before the first batch, for `num_classes` categories and `size` numbers per sample."""
        return cls(
            jnp.zeros((num_classes, size), dtype), jnp.zeros((num_classes, size), dtype), jnp.zeros(num_classes, dtype)
        )


@partial(jax.jit, static_argnames=("num_classes", "momentum", "variant", "axis_name"))
def running_category_structure_loss(
    student_features: jax.Array,
    teacher_features: jax.Array,
    labels: jax.Array,
    running: RunningCenters,
    *,
    momentum: float,
    num_classes: int,
    student_logits: jax.Array | None = None,
    teacher_logits: jax.Array | None = None,
    variant: str = "paper",
    intra_weight: float | None = None,
    inter_weight: float | None = None,
    compactness_weight: float | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], RunningCenters]:
    """Computes `category_structure_loss` around centers that remember earlier batches.

    In a uniformly drawn batch, many samples are the only one of their category. Such a sample is its own center and
    says nothing about the structure within the category. Here the features of a category i of the batch are centered at
      R_i <- (1 - a) R_i + a C_i,   a = (1 - momentum) / w_i,   w_i <- momentum w_i + (1 - momentum),
    where C_i is the center in the batch (Eq. 6) and w starts at zero. A category that is seen for the first time has
    a = 1 and the center of the batch. With momentum 0 the loss equals `category_structure_loss` without the filter. The
    inter-category part differentiates through C_i within R_i. The logit terms use the centers of the batch.

    Time is as for `category_structure_loss`; memory is O(num_classes D) for `running` on every device.

    Args:
      student_features: Features of the student after sigma (projected to the teacher's channels), float [B, ..., D'].
      teacher_features: Features of the teacher, float, in the shape of student_features, never differentiated.
      labels: Labels, int [B], in [0, num_classes).
      running: Centers returned for the previous batch, or `RunningCenters.zeros`, never differentiated.
      momentum: Momentum of the centers, in [0, 1), static.
      num_classes: Number of classes, static.
      student_logits: Logits of the student, float [B, C]; without them, the logit terms of "reference" are left out.
      teacher_logits: Logits of the teacher, float [B, C], given together with student_logits, never differentiated.
      variant: Variant of the loss, "paper" or "reference", static.
      intra_weight: Weight of the intra-category terms, with the defaults of `category_structure_loss`.
      inter_weight: Weight of the inter-category terms, with the defaults of `category_structure_loss`.
      compactness_weight: Weight of compactness, for "reference" only; None is 0.1.
      axis_name: Name of the mapped axis (`jax.pmap`) over which the batch is split, static.

    Returns:
      The scalar category, the terms, and the new running centers (without gradient).

    Raises:
      TypeError: If features or logits are not floating point, or the labels not integers.
      ValueError: If `category_structure_loss` would raise it, if the running centers have other shapes, or if the
        momentum is out of range.
    """
    return _category_structure(
        student_features,
        teacher_features,
        labels,
        num_classes=num_classes,
        logits=(student_logits, teacher_logits),
        variant=variant,
        weights=(intra_weight, inter_weight, compactness_weight),
        filter_misclassified=None if variant == "paper" else False,
        axis_name=axis_name,
        running=running,
        momentum=momentum,
    )


def _category_structure(
    student_features,
    teacher_features,
    labels,
    *,
    num_classes,
    logits,
    variant,
    weights,
    filter_misclassified,
    axis_name,
    running=None,
    momentum=0.0,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """Returns (category, terms, new running centers or None): the computation that both public losses share."""
    filter_misclassified = _check_arguments(
        student_features,
        teacher_features,
        labels,
        num_classes,
        logits[0],
        logits[1],
        variant,
        weights[2],
        filter_misclassified,
    )
    intra_weight, inter_weight, compactness_weight = (
        default if weight is None else weight for weight, default in zip(weights, VARIANT_WEIGHTS[variant], strict=True)
    )
    index = category_index(labels, num_classes=num_classes, axis_name=axis_name)
    student, teacher = _flatten(student_features), lax.stop_gradient(_flatten(teacher_features))
    sums = tuple(_category_sums(f, index, axis_name=axis_name)[0] for f in (student, teacher))
    counts = index.counts
    if running is not None:
        _check_running(running, num_classes, student.shape[1], momentum)
        sums, running = _mix_running(running, momentum, sums, index)
        counts = index.present.astype(counts.dtype)
    if variant == "paper":
        terms = _paper_terms(student, teacher, sums, counts, index, axis_name)
    else:
        terms = _reference_terms(student, teacher, sums, counts, logits, labels, index, filter_misclassified, axis_name)
    intra = intra_weight * (terms["intra_feature"] + terms.get("intra_logits", 0.0))
    intra += compactness_weight * terms.get("compactness", 0.0)
    inter = inter_weight * (terms["inter_feature"] + terms.get("inter_logits", 0.0))
    category = intra + inter
    return category, terms | {"intra": intra, "inter": inter, "category": category}, running


def _mix_running(running, momentum, sums, index):
    """Mixes the batch into the running averages.

    Returns:
      The centers [K, D] of student and teacher, zero for absent categories, and the new `RunningCenters`.
    """
    running = RunningCenters(*map(lax.stop_gradient, running))
    present = index.present
    weights = momentum * running.weights[index.categories] + (1 - momentum)
    share = ((1 - momentum) / weights)[:, None]
    mixed = tuple(
        # Unlike old + share (new - old), this is exactly the center of the batch where the share is 1.
        jnp.where(present[:, None], (1 - share) * old[index.categories] + share * _means(new, index.counts), 0)
        for old, new in zip(running[:2], sums, strict=True)
    )
    # Rows past the last category, which are the slots that no category uses, are dropped.
    rows = jnp.where(present, index.categories, len(running.weights))
    kept = (
        old.at[rows].set(lax.stop_gradient(new), mode="drop")
        for old, new in zip(running, (*mixed, weights), strict=True)
    )
    return mixed, RunningCenters(*kept)


def _paper_terms(student, teacher, sums, counts, index, axis_name):
    """Returns the terms of Eq. 9 without their weights; `sums` is (student, teacher)."""
    squared = jnp.sum(jnp.square(_intra_difference(student, teacher, sums, counts, index.slots)), axis=1)
    squared_norms = lax.stop_gradient(jnp.sum(jnp.square(student) + jnp.square(teacher), axis=1))
    # The norm of a category stacks all its samples, which may lie on several devices.
    squared, squared_norms = (_segment_sum(x, index.slots, len(counts), axis_name) for x in (squared, squared_norms))
    norms = safe_sqrt(squared, rounding_of_difference(squared_norms))
    num_present = jnp.sum(index.present).astype(norms.dtype)
    cosines_s, cosines_t = map(inter_category_structure, sums)
    squared = jnp.sum(jnp.square(cosines_t - cosines_s))
    squared_norms = jnp.sum(jnp.square(cosines_s) + jnp.square(cosines_t))
    return {
        "intra_feature": jnp.sum(norms) / num_present,
        "inter_feature": safe_sqrt(squared, rounding_of_difference(squared_norms)),
    }


def _reference_terms(student, teacher, sums, counts, logits, labels, index, filter_misclassified, axis_name):
    """Returns the terms of the released code without their weights; `sums` and `logits` are (student, teacher)."""
    with_logits = logits[0] is not None
    if with_logits:
        logits = at_least_float32(logits[0]), lax.stop_gradient(at_least_float32(logits[1]))
    if filter_misclassified:
        structure_s, structure_t = (
            intra_category_structure(
                features,
                *category_centers(features, index, mask=_is_correct(z, labels), axis_name=axis_name),
                index.slots,
            )
            for features, z in zip((student, teacher), logits, strict=True)
        )
        difference = structure_t - structure_s
    else:
        difference = _intra_difference(student, teacher, sums, counts, index.slots)
    terms = {
        "intra_feature": jnp.mean(jnp.square(difference)) / student.shape[1],
        "inter_feature": _inter_mse(sums, index.present),
    }
    if with_logits:
        sums = tuple(_category_sums(z, index, axis_name=axis_name)[0] for z in logits)
        difference = _intra_difference(logits[0], logits[1], sums, index.counts, index.slots)
        terms["intra_logits"] = jnp.mean(jnp.square(difference)) / difference.shape[1]
        terms["inter_logits"] = _inter_mse(sums, index.present)
        deviation = intra_category_structure(logits[0], _means(sums[0], index.counts), index.counts, index.slots)
        terms["compactness"] = jnp.mean(jnp.square(deviation))
    return terms


def _intra_difference(student, teacher, sums, counts, slots):
    """Returns Psi(F^t) - Psi(F^s) [B, D]; Psi is linear, so it is the structure of the difference."""
    sums_s, sums_t = sums
    return intra_category_structure(teacher - student, _means(sums_t - sums_s, counts), counts, slots)


def _inter_difference(sums):
    """Returns M^t - M^s [K, K]; cosines do not depend on lengths, so the sums work as well as the centers."""
    sums_s, sums_t = sums
    return inter_category_structure(sums_t) - inter_category_structure(sums_s)


def _inter_mse(sums, present):
    # Rows of absent categories are zero in both matrices, so the sum needs no mask; only the mean needs their count.
    difference = _inter_difference(sums)
    num_present = jnp.sum(present).astype(difference.dtype)
    return jnp.sum(jnp.square(difference)) / num_present**3


def _is_correct(logits, labels):
    """Returns whether argmax(logits) == labels, bool [B].

    The condition is written as comparisons, which vectorize: no logit is larger than the label's, and no logit of an
    earlier class is equal to it.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1], dtype=jnp.int32) < labels.astype(jnp.int32)[:, None]
    return ~jnp.any((logits > own) | (earlier & (logits == own)), axis=1)


def _flatten(features):
    features = at_least_float32(features)
    return features.reshape(features.shape[0], -1)


def _segment_sum(values, segments, num_segments, axis_name):
    """Returns jax.ops.segment_sum of values [B] or [B, D] over the global batch."""
    # This is the scatter to which XLA lowers segment_sum, but with windows [1, D], which XLA reads in place instead of
    # copying all values first.
    windows = values.reshape(len(values), 1, -1)
    dimensions = lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
    )
    zeros = jnp.zeros((num_segments, windows.shape[2]), values.dtype)
    sums = lax.scatter_add(zeros, segments[:, None], windows, dimensions, mode="drop")
    return sum_batch(sums.reshape(num_segments, *values.shape[1:]), axis_name)


@jax.custom_jvp
def _gram(x):
    """Returns x x^T at full precision (accelerators would otherwise multiply float32 with fewer bits)."""
    return jnp.dot(x, x.T, precision=lax.Precision.HIGHEST)


@_gram.defjvp
def _gram_jvp(primals, tangents):
    # Thanks to symmetry, the transpose needs one product instead of two.
    (x,), (dx,) = primals, tangents
    half = jnp.dot(dx, x.T, precision=lax.Precision.HIGHEST)
    return _gram(x), half + half.T


def _check_arguments(
    student_features,
    teacher_features,
    labels,
    num_classes,
    student_logits,
    teacher_logits,
    variant,
    compactness_weight,
    filter_misclassified,
) -> bool:
    """Checks the arguments of `category_structure_loss`; returns filter_misclassified with its default filled in."""
    if variant not in VARIANT_WEIGHTS:
        raise ValueError(f"variant must be one of {sorted(VARIANT_WEIGHTS)}, got {variant!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    check_float("student_features", student_features, min_ndim=2)
    check_float("teacher_features", teacher_features, min_ndim=2)
    check_same_shape(student_features=student_features, teacher_features=teacher_features)
    check_labels(labels, student_features.shape[0])
    if (student_logits is None) != (teacher_logits is None):
        raise ValueError("student_logits and teacher_logits must be given together")
    if student_logits is not None:
        check_logits(student_logits, teacher_logits)
        if student_logits.shape != (student_features.shape[0], num_classes):
            expected = (student_features.shape[0], num_classes)
            raise ValueError(f"logits must have shape {expected}: (batch, num_classes), got {student_logits.shape}")
    if variant == "paper":
        if filter_misclassified or compactness_weight is not None:
            raise ValueError("filter_misclassified and compactness_weight apply only to variant 'reference'")
        return False
    filter_misclassified = True if filter_misclassified is None else filter_misclassified
    if filter_misclassified and student_logits is None:
        raise ValueError(
            "variant 'reference' needs student_logits and teacher_logits, "
            "or filter_misclassified=False to leave its logit terms out"
        )
    return filter_misclassified


def _check_running(running, num_classes, size, momentum):
    shapes = tuple(jnp.shape(x) for x in running)
    expected = ((num_classes, size), (num_classes, size), (num_classes,))
    if shapes != expected:
        raise ValueError(f"running centers must have shapes {expected}: (categories, features), got {shapes}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")


def project_student(method: Method, inputs: LossInputs) -> tuple[jax.Array, jax.Array]:
    """Returns the last feature maps of student and teacher, with the student's projected by sigma.

    sigma is a parameter of `method`: a 1x1 convolution without bias from the student's channels to the teacher's
    (paper, section 3.3). If the maps differ in height or width, which does not occur in the paper, the larger is
    average-pooled to the size of the smaller, as in the other methods. Call this function from the compact `__call__`
    of the method.
    """
    student, teacher = inputs.student.features[-1], inputs.teacher.features[-1]
    if student.shape[1:-1] != teacher.shape[1:-1]:
        if not student.ndim == teacher.ndim == 4:
            raise ValueError(
                f"the last features of student {student.shape} and teacher {teacher.shape} differ in size, "
                "but only maps [B, H, W, D] can be pooled"
            )
        student, teacher = pool_to_common_size(student, teacher)
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    dtype = np.promote_types(student.dtype, np.float32)
    sigma = method.param("sigma", init, (student.shape[-1], teacher.shape[-1]), dtype)
    return student @ sigma.astype(student.dtype), teacher


class CategoryStructure(Method):
    """Applies `category_structure_loss` to the last feature maps and the logits, with the trainable projection sigma.

    `project_student` defines the projection sigma and the pooling of maps that differ in size.

    Attributes:
      variant: Variant of the loss: "reference", as in the code released with the paper, or "paper".
      intra_weight: Weight of the structure within classes; None is 0.002 for "reference" and 0.01 for "paper".
      inter_weight: Weight of the structure between classes; None is 0.04 for "reference" and 0.2 for "paper".
      compactness_weight: Weight of compactness, for "reference" only; None is 0.1.
      filter_misclassified: Whether the centers use only the samples that a network classifies correctly, for
        "reference" only; None is True.
      center_momentum: Momentum of centers that remember earlier batches, in [0, 1), which needs
        filter_misclassified=False in "reference"; None uses the centers of the batch alone.
    """

    variant: Literal["reference", "paper"] = "reference"
    intra_weight: float | None = None
    inter_weight: float | None = None
    compactness_weight: float | None = None
    filter_misclassified: bool | None = None
    center_momentum: Fraction | None = None
    multilabel: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, str]] = {"intra": "intra_weight", "inter": "inter_weight"}

    @nn.compact
    def __call__(self, inputs: LossInputs):
        student, teacher = project_student(self, inputs)
        settings = {
            "num_classes": self.num_classes,
            "student_logits": inputs.student.logits,
            "teacher_logits": inputs.teacher.logits,
            "variant": self.variant,
            "intra_weight": self.intra_weight,
            "inter_weight": self.inter_weight,
            "compactness_weight": self.compactness_weight,
            "axis_name": self.axis_name,
        }
        if self.center_momentum is None:
            settings["filter_misclassified"] = self.filter_misclassified
            return category_structure_loss(student, teacher, inputs.labels, **settings)
        if self.filter_misclassified or (self.filter_misclassified is None and self.variant == "reference"):
            raise ValueError("center_momentum needs filter_misclassified=False: running centers use all samples")
        size, dtype = student.size // len(student), np.promote_types(student.dtype, np.float32)
        memory = self.variable(
            "memory", "centers", lambda: RunningCenters.zeros(self.num_classes, size, dtype)._asdict()
        )
        value, terms, running = running_category_structure_loss(
            student,
            teacher,
            inputs.labels,
            RunningCenters(**memory.value),
            momentum=self.center_momentum,
            **settings,
        )
        if not self.is_initializing():
            memory.value = running._asdict()
        return value, terms
