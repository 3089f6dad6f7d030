"""SRRL: the student's features, passed through the teacher's classifier, give the teacher's logits."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._checks import (
    at_least_float32,
    check_averages_maps,
    check_float,
    check_same_batch,
    check_same_shape,
)
from cskd_jax.losses._connectors import Connector
from cskd_jax.losses.base import Head, LossInputs, Method


def srrl_loss(
    student_embedding: jax.Array,
    teacher_embedding: jax.Array,
    teacher_logits: jax.Array,
    teacher_head: Head,
    *,
    regression_weight: float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes softmax regression representation learning.

    The loss is mean (x^s - x^t)^2 + regression_weight mean (W x^s + b - z^t)^2, each mean taken over all elements, with
    the embeddings x and the teacher's classifier W, b. The logits themselves are compared, without a softmax. Time is
    O(B D C).

    Args:
      student_embedding: Embeddings of the student in the teacher's space, float [B, D].
      teacher_embedding: Embeddings of the teacher, float [B, D], never differentiated.
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.
      teacher_head: Classifier of the teacher, with D features and C classes, never differentiated.
      regression_weight: Weight of the term on the logits.

    Returns:
      A scalar of at least float32, and the unweighted terms `feature` and `regression`.

    Raises:
      TypeError: If embeddings or logits are not floating point.
      ValueError: If shapes do not fit.

    References:
      Yang, Martinez, Bulat, Tzimiropoulos, "Knowledge Distillation via Softmax Regression Representation Learning",
      ICLR 2021; code: https://github.com/jingyang2017/KD_SRRL.
    """
    check_float("student_embedding", student_embedding, ndim=2)
    check_float("teacher_embedding", teacher_embedding, ndim=2)
    check_float("teacher_logits", teacher_logits, ndim=2)
    check_same_shape(student_embedding=student_embedding, teacher_embedding=teacher_embedding)
    check_same_batch(student_embedding=student_embedding, teacher_logits=teacher_logits)
    student = at_least_float32(student_embedding)
    predicted = lax.stop_gradient(teacher_head)(student)
    check_same_shape(predicted_logits=predicted, teacher_logits=teacher_logits)

    def mean_squared(difference):
        return jnp.mean(jnp.square(difference))

    feature = mean_squared(student - lax.stop_gradient(at_least_float32(teacher_embedding)))
    regression = mean_squared(predicted - lax.stop_gradient(at_least_float32(teacher_logits)))
    return feature + regression_weight * regression, {"feature": feature, "regression": regression}


class SRRL(Method):
    """Applies `srrl_loss` to the embedding, through a trained connector: 1x1 convolution, normalization, ReLU.

    Attributes:
      variant: What the connector maps: "vectors" for the pooled embedding, as https://github.com/DefangChen/SimKD does
        for CIFAR-100; "maps" for the last map, which is pooled afterwards, as the authors do for ImageNet.
      regression_weight: Weight of the term on the logits.
    """

    variant: Literal["vectors", "maps"] = "vectors"
    regression_weight: float = 1.0

    @nn.compact
    def __call__(self, inputs: LossInputs):
        if inputs.teacher.head_logits:
            raise ValueError(
                "it needs a teacher with one classifier, but this one predicts with the mean of several heads, such as "
                "that of a distillation token"
            )
        if self.variant == "vectors":
            student, teacher = inputs.student.embedding[:, None, None, :], inputs.teacher.embedding
        else:
            check_averages_maps(teacher=inputs.teacher)
            student, teacher = inputs.student.features[-1], jnp.mean(inputs.teacher.features[-1], axis=(1, 2))
        connected = nn.relu(Connector(teacher.shape[-1], axis_name=self.axis_name, name="connector")(student))
        return srrl_loss(
            jnp.mean(connected, axis=(1, 2)),
            teacher,
            inputs.teacher.logits,
            inputs.teacher_head,
            regression_weight=self.regression_weight,
        )
