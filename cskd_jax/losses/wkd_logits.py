"""Wasserstein distillation of logits: how far probability has to move between more or less similar classes."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._arrays import safe_rsqrt
from cskd_jax.losses._checks import at_least_float32, check_float, check_labels, check_logits, check_temperature
from cskd_jax.losses._logits import is_class
from cskd_jax.losses.base import Count, LossInputs, Method, Positive

# This number is added to the costs and to the denominators, as in the authors' code.
_EPSILON = 1e-8


def classifier_cost(kernel: jax.Array, *, sharpen: float = 1.0) -> jax.Array:
    """Computes costs between classes from classifier weights: 1 - the cosine between the weights of two classes.

    Args:
      kernel: Weights, float [D, C].
      sharpen: If not 0, a cost d becomes 1 - exp(-sharpen d).

    Returns:
      An array [C, C] of at least float32.

    Raises:
      TypeError: If the weights are not floating point.
      ValueError: If they do not have 2 dimensions.

    References:
      See `wkd_logits_loss`.
    """
    check_float("kernel", kernel, ndim=2)
    kernel = at_least_float32(kernel)
    rows = (kernel * safe_rsqrt(jnp.sum(jnp.square(kernel), axis=0))).T
    return _sharpen(1 - _dot(rows, rows.T), sharpen)


def cka_cost(class_features: jax.Array, *, sharpen: float = 1.0) -> jax.Array:
    """Computes costs between classes from features of their images: 1 - the linear CKA between two classes.

    With the features X of a class, centered over its images, CKA = |Y' X|_F^2 / (|X' X|_F |Y' Y|_F).

    Args:
      class_features: Features of N images of each class, float [C, N, D]; the n-th images of all classes are compared.
      sharpen: If not 0, a cost d becomes 1 - exp(-sharpen d).

    Returns:
      An array [C, C] of at least float32.

    Raises:
      TypeError: If the features are not floating point.
      ValueError: If they do not have 3 dimensions.

    References:
      See `wkd_logits_loss`.
    """
    check_float("class_features", class_features, ndim=3)
    features = at_least_float32(class_features)
    features = features - jnp.mean(features, axis=1, keepdims=True)
    # |Y' X|_F^2 is the inner product of the N x N kernels of both classes.
    kernels = jnp.einsum("cnd,cmd->cnm", features, features, precision=lax.Precision.HIGHEST)
    kernels = kernels.reshape(len(kernels), -1)
    kernels = kernels * safe_rsqrt(jnp.sum(jnp.square(kernels), axis=1, keepdims=True))
    return _sharpen(1 - _dot(kernels, kernels.T), sharpen)


def _sharpen(distances, sharpen):
    return 1 - jnp.exp(-sharpen * distances) if sharpen else distances


def _dot(a, b):
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def sinkhorn_distance(
    student: jax.Array,
    teacher: jax.Array,
    cost: jax.Array,
    *,
    regularization: float = 0.05,
    iterations: int = 10,
    support: jax.Array | None = None,
) -> jax.Array:
    """Computes entropy-regularized transport costs between distributions over classes by Sinkhorn iterations.

    With D = max(cost, 0) + 1e-8 and K = exp(-D / regularization), u starts at 1 over the number of classes, and the
    updates v = b / (K' u + 1e-8) and u = a / (K v + 1e-8) alternate; the cost is sum_ij u_i K_ij v_j D_ij. All
    iterations are differentiated. Time is O(iterations B C^2), memory O(iterations B C + C^2).

    Args:
      student: Probabilities a, float [B, C].
      teacher: Probabilities b, float [B, C].
      cost: Costs, float [C, C], never differentiated.
      regularization: Weight of the entropy, greater than 0.
      iterations: Number of iterations, at least 1.
      support: Mask of the classes that take part, bool [B, C], outside of which both probabilities must be 0; None for
        all. The result is the same as for smaller arrays without the other classes.

    Returns:
      An array [B] of at least float32.

    Raises:
      TypeError: If the costs are not floating point.
      ValueError: If shapes do not fit, or if a setting is out of range.
    """
    classes = student.shape[1]
    check_float("cost", cost, ndim=2)
    if cost.shape != (classes, classes):
        raise ValueError(f"cost must have shape {(classes, classes)}: classes times classes, got {cost.shape}")
    if not regularization > 0:
        raise ValueError(f"regularization must be greater than 0, got {regularization}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    distance = jnp.maximum(lax.stop_gradient(cost).astype(student.dtype), 0) + _EPSILON
    kernel = jnp.exp(-distance / regularization)
    mask = jnp.ones(student.shape, student.dtype) if support is None else support.astype(student.dtype)
    u = mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)

    def iterate(_, scalings):
        u, _ = scalings
        v = teacher / (_dot(u, kernel) + _EPSILON)
        return student / (_dot(v, kernel.T) + _EPSILON), v

    u, v = lax.fori_loop(0, iterations, iterate, (u, mask))
    return jnp.sum(u * _dot(v, (kernel * distance).T), axis=1)


def wkd_logits_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    cost: jax.Array,
    *,
    temperature: float = 2.0,
    regularization: float = 0.05,
    iterations: int = 10,
) -> jax.Array:
    """Computes the Wasserstein distance of WKD between student and teacher over the classes other than the label.

    This is the `sinkhorn_distance` between the distributions softmax(z / T) over the other classes. The authors add
    `weighted_target_loss` for the label. There is no factor T^2.

    Args:
      student_logits: Logits of the student, float [B, C], with C >= 2.
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.
      labels: Labels, int [B], in [0, C).
      cost: Costs of moving probability from one class to another, float [C, C], never differentiated; see
        `classifier_cost` and `cka_cost`.
      temperature: Temperature T, greater than 0.
      regularization: Weight of the entropy in the transport, greater than 0.
      iterations: Number of Sinkhorn iterations, at least 1.

    Returns:
      A scalar of at least float32: the mean over the batch.

    Raises:
      TypeError: If logits or costs are not floating point, or the labels not integers.
      ValueError: If shapes do not fit, if there are fewer than 2 classes, or if a setting is out of range.

    References:
      Lv, Yang, Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation", NeurIPS 2024,
      https://arxiv.org/abs/2412.08139; code: https://github.com/JiamingLv/WKD.
    """
    check_logits(student_logits, teacher_logits)
    check_labels(labels, student_logits.shape[0])
    if student_logits.shape[1] < 2:
        raise ValueError(f"wkd_logits_loss needs at least 2 classes, got {student_logits.shape[1]}")
    check_temperature(temperature)
    others = ~is_class(labels, student_logits.shape[1])
    logits = at_least_float32(student_logits), lax.stop_gradient(at_least_float32(teacher_logits))
    student, teacher = (jax.nn.softmax(jnp.where(others, z / temperature, -jnp.inf)) for z in logits)
    settings = {"regularization": regularization, "iterations": iterations}
    return jnp.mean(sinkhorn_distance(student, teacher, cost, **settings, support=others))


class WKDLogits(Method):
    """Applies `wkd_logits_loss` to the logits, with costs from `classifier_cost` of the teacher's classifier.

    Attributes:
      temperature: Temperature of the softmax, greater than 0.
      regularization: Weight of the entropy in the transport, greater than 0.
      iterations: Number of Sinkhorn iterations.
      sharpen: How much the costs are sharpened; 0 leaves them unchanged.
    """

    temperature: Positive = 2.0
    regularization: Positive = 0.05
    iterations: Count = 10
    sharpen: float = 1.0
    multilabel: ClassVar[bool] = False

    def __call__(self, inputs: LossInputs):
        if inputs.teacher_head is None:
            raise ValueError("wkd_l reads the weights of the teacher's classifier, which that network does not provide")
        value = wkd_logits_loss(
            inputs.student.logits,
            inputs.teacher.logits,
            inputs.labels,
            classifier_cost(inputs.teacher_head.kernel, sharpen=self.sharpen),
            temperature=self.temperature,
            regularization=self.regularization,
            iterations=self.iterations,
        )
        return value, {}
