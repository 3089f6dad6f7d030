"""VkD: the student's features, projected by an orthogonal matrix, learn the teacher's normalized features."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._checks import at_least_float32, check_float, check_same_shape
from cskd_jax.losses._connectors import Orthogonal
from cskd_jax.losses.base import EmbeddingSource, LossInputs, Method, Positive
from cskd_jax.losses.embedding import read_student, smooth_l1_loss
from cskd_jax.losses.logits import kd_loss

# The number that layer normalization adds to the variance.
_EPSILON = 1e-5


def vkd_loss(student_embedding: jax.Array, teacher_embedding: jax.Array) -> jax.Array:
    """Computes the mean smooth L1 distance between projected features and the teacher's layer-normalized ones.

    The distance is `smooth_l1_loss`. Time and memory are O(B D).

    Args:
      student_embedding: Features of the student, projected to the teacher's size by an orthogonal matrix, float
        [B, D].
      teacher_embedding: Features of the teacher, float [B, D], never differentiated. Each sample is scaled to mean 0
        and variance 1 over its features, with 1e-5 added to the variance.

    Returns:
      A scalar of at least float32: the mean over all B D elements.

    Raises:
      TypeError: If the features are not floating point.
      ValueError: If shapes differ.

    References:
      Miles, Elezi, Deng, "VkD: Improving Knowledge Distillation using Orthogonal Projections", CVPR 2024,
      https://arxiv.org/abs/2403.06213; code: https://github.com/roymiles/vkd.
    """
    check_float("student_embedding", student_embedding, ndim=2)
    check_float("teacher_embedding", teacher_embedding, ndim=2)
    check_same_shape(student_embedding=student_embedding, teacher_embedding=teacher_embedding)
    teacher = lax.stop_gradient(at_least_float32(teacher_embedding))
    teacher -= jnp.mean(teacher, axis=1, keepdims=True)
    teacher *= lax.rsqrt(jnp.mean(jnp.square(teacher), axis=1, keepdims=True) + _EPSILON)
    return smooth_l1_loss(student_embedding, teacher)


class VkD(Method):
    """Applies `vkd_loss` to the features of both networks, and `kd_loss` to their logits.

    The student's features are mapped by a trained orthogonal matrix, `_connectors.Orthogonal`, whose parameters do not
    decay. In a student with a distillation token, such as the authors' student, the head of that token learns the
    teacher's logits; in any other student, the classifier does.

    Attributes:
      student: Features of the student: "embedding", or "tokens", the mean over the positions of the last stage.
      representation_weight: Weight of the loss on the features.
      kd_weight: Weight of `kd_loss` on the logits; with 0, no logits are read.
      temperature: Temperature of the softmax of the logits, greater than 0.
    """

    student: EmbeddingSource = "embedding"
    representation_weight: float = 1.0
    kd_weight: float = 1.0
    temperature: Positive = 1.0

    @property
    def softmax(self) -> bool:
        return self.kd_weight != 0

    @property
    def undecayed(self) -> tuple[str, ...]:
        return ("projector",)

    @nn.compact
    def __call__(self, inputs: LossInputs):
        teacher = inputs.teacher.embedding
        projected = Orthogonal(teacher.shape[-1], name="projector")(read_student(inputs, self.student))
        representation = vkd_loss(projected, teacher)
        if not self.kd_weight:
            return self.representation_weight * representation, {"representation": representation}
        heads = inputs.student.head_logits
        kd = kd_loss(heads[1] if heads else inputs.student.logits, inputs.teacher.logits, temperature=self.temperature)
        value = self.representation_weight * representation + self.kd_weight * kd
        return value, {"representation": representation, "kd": kd}
