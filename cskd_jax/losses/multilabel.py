"""Category structure for samples that belong to several categories, or to none.

The loss is that of `cskd_jax.losses.category`, with a row of weights for each sample in place of one label. Where every
row is one-hot, the two losses are equal.
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._arrays import rounding_of_difference, safe_sqrt
from cskd_jax.losses._batch import sum_batch
from cskd_jax.losses._checks import at_least_float32, check_float, check_multilabels, check_same_shape
from cskd_jax.losses.base import LossInputs, Method
from cskd_jax.losses.category import VARIANT_WEIGHTS, inter_category_structure, project_student


@partial(jax.jit, static_argnames=("variant", "axis_name"))
def multilabel_category_structure_loss(
    student_features: jax.Array,
    teacher_features: jax.Array,
    labels: jax.Array,
    *,
    variant: str = "paper",
    intra_weight: float | None = None,
    inter_weight: float | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the category-structure loss of samples that may belong to several categories.

    With weights y_ji (sample j, category i), features F_j flattened to D numbers, centers C_i = sum_j y_ji F_j / sum_j
    y_ji, deviations Psi_ji = F_j - C_i, cosines of centers M (Chen et al., Eq. 8), and K categories with a sample in
    the batch (sum_j y_ji > 0):

    variant "paper" (Eq. 9; the norms are not squared)
      intra_feature = 1/K sum_i sqrt(sum_j y_ji ||Psi^t_ji - Psi^s_ji||^2)     inter_feature = || M^t - M^s ||_2
    variant "reference" (released code, without its filter, its terms on logits, and compactness)
      intra_feature = sum_ji y_ji ||Psi^t_ji - Psi^s_ji||^2 / (D sum_ji y_ji) / D
      inter_feature = mean (M^t - M^s)^2 / K

    intra = intra_weight intra_feature,      inter = inter_weight inter_feature,      category = intra + inter.

    A sample of several categories is part of the structure of each. Where every row of the labels is one-hot, the loss
    equals `category_structure_loss` (for "reference", with filter_misclassified=False and without logits). The
    student's center is not differentiated in the intra term; weighted deviations sum to zero, so this changes no
    gradient. The authors' released code is at https://github.com/xeanzheng/CSKD.

    Time is O(B C D + C^2 D). Memory is O(B D + C D + B C + C^2), including the gradient: categories are compared with
    the batch one after another. Values and gradients are finite for categories without samples, samples without
    categories, and zero features; a category with one sample adds exactly 0 to the intra term, whatever its weight.
    Differences of rounding size count as 0 in variant "paper", as in `category_structure_loss`.

    Args:
      student_features: Features of the student after sigma (projected to the teacher's channels), float [B, ..., D'].
      teacher_features: Features of the teacher, float, in the shape of student_features, never differentiated.
      labels: Labels, float or bool [B, C]: 0 or 1, or weights of at least 0 (not checked). They are never
        differentiated.
      variant: Variant of the loss, "paper" or "reference", static.
      intra_weight: Weight of the intra-category term; None is 0.01 for "paper" (its beta) and 0.002 for "reference".
      inter_weight: Weight of the inter-category term; None is 0.2 for "paper" (its gamma) and 0.04 for "reference".
      axis_name: Name of the mapped axis (`jax.pmap`) over which the batch is split, static. All terms are then computed
        over the global batch, and the mean over devices of the gradients equals the gradient of the global batch on one
        device.

    Returns:
      The scalar category, and a dict of scalars: the unweighted terms above, and `intra`, `inter`, `category`. They are
      computed in float32, or in float64 where the inputs are float64.

    Raises:
      TypeError: If the features are not floating point, or the labels are neither floating point nor bool.
      ValueError: If shapes do not fit, or if the variant is unknown.

    References:
      Chen et al., ECCV 2020, https://doi.org/10.1007/978-3-030-58604-1_13, Eq. 6 to 9, for one category per sample.
    """
    if variant not in VARIANT_WEIGHTS:
        raise ValueError(f"variant must be one of {sorted(VARIANT_WEIGHTS)}, got {variant!r}")
    check_float("student_features", student_features, min_ndim=2)
    check_float("teacher_features", teacher_features, min_ndim=2)
    check_same_shape(student_features=student_features, teacher_features=teacher_features)
    check_multilabels(labels, student_features.shape[0])
    default_intra, default_inter, _ = VARIANT_WEIGHTS[variant]
    intra_weight = default_intra if intra_weight is None else intra_weight
    inter_weight = default_inter if inter_weight is None else inter_weight

    student, teacher = (at_least_float32(f).reshape(len(f), -1) for f in (student_features, teacher_features))
    teacher, labels = lax.stop_gradient(teacher), lax.stop_gradient(labels.astype(student.dtype))
    counts = sum_batch(jnp.sum(labels, axis=0), axis_name)
    centers_s, centers_t = (_centers(f, labels, counts, axis_name) for f in (student, teacher))
    # Psi is linear: the difference of the structures is the structure of the difference.
    center = lax.stop_gradient(centers_t - centers_s)
    squares = sum_batch(_squared_deviations(teacher - student, center, labels), axis_name)
    cosines_t, cosines_s = inter_category_structure(centers_t), inter_category_structure(centers_s)
    difference = cosines_t - cosines_s
    num_present = jnp.maximum(jnp.sum(counts > 0), 1).astype(squares.dtype)
    if variant == "paper":
        squared_norms = jnp.sum(jnp.square(student) + jnp.square(teacher), axis=1)
        squared_norms = sum_batch(jnp.sum(labels * lax.stop_gradient(squared_norms)[:, None], axis=0), axis_name)
        intra_feature = jnp.sum(safe_sqrt(squares, rounding_of_difference(squared_norms))) / num_present
        squared_norms = jnp.sum(jnp.square(cosines_s) + jnp.square(cosines_t))
        inter_feature = safe_sqrt(jnp.sum(jnp.square(difference)), rounding_of_difference(squared_norms))
    else:
        intra_feature = jnp.sum(squares) / _or_one(jnp.sum(counts)) / student.shape[1] ** 2
        # Rows of absent categories are zero in both matrices, so the sum needs no mask; only the mean needs a count.
        inter_feature = jnp.sum(jnp.square(difference)) / num_present**3
    intra, inter = intra_weight * intra_feature, inter_weight * inter_feature
    category = intra + inter
    terms = {"intra_feature": intra_feature, "inter_feature": inter_feature}
    return category, terms | {"intra": intra, "inter": inter, "category": category}


def _centers(features, labels, counts, axis_name):
    """Returns the centers [C, D], zero for categories without samples."""
    # A weight divided by itself is exactly 1, so the center of a category with one sample is exactly that sample.
    shares = labels / _or_one(counts)
    return sum_batch(jnp.dot(shares.T, features, precision=lax.Precision.HIGHEST), axis_name)


def _squared_deviations(features, centers, labels):
    """Returns, for each category [C], the sum over this device's samples j of y_ji ||F_j - C_i||^2.

    The differences themselves are squared, which avoids the cancellation of the expanded square.
    """

    @jax.checkpoint  # Otherwise the deviations from every center would be kept for the gradient.
    def of_category(category):
        center, weights = category
        return jnp.sum(weights * jnp.sum(jnp.square(features - center), axis=1))

    return lax.map(of_category, (centers, labels.T))


def _or_one(counts):
    return jnp.where(counts > 0, counts, 1)


class MultilabelCategoryStructure(Method):
    """Applies `multilabel_category_structure_loss` to the last feature maps, with the trainable projection sigma.

    `project_student` defines the projection sigma.

    Attributes:
      variant: Variant of the loss: "paper", or "reference", as in the code released with the paper.
      intra_weight: Weight of the structure within classes; None is 0.01 for "paper" and 0.002 for "reference".
      inter_weight: Weight of the structure between classes; None is 0.2 for "paper" and 0.04 for "reference".
    """

    variant: Literal["reference", "paper"] = "paper"
    intra_weight: float | None = None
    inter_weight: float | None = None
    multilabel: ClassVar[bool] = True
    parts: ClassVar[Mapping[str, str]] = {"intra": "intra_weight", "inter": "inter_weight"}

    @nn.compact
    def __call__(self, inputs: LossInputs):
        student, teacher = project_student(self, inputs)
        return multilabel_category_structure_loss(
            student,
            teacher,
            inputs.labels,
            variant=self.variant,
            intra_weight=self.intra_weight,
            inter_weight=self.inter_weight,
            axis_name=self.axis_name,
        )
