"""Functions that logit losses share: standardized logits, the label against the rest, softmax over some classes."""

import jax
import jax.numpy as jnp

from cskd_jax.losses._arrays import rounding_of_mean, safe_sqrt
from cskd_jax.losses._checks import at_least_float32, check_float
from cskd_jax.losses.base import LossInputs

# This number is added to the standard deviation, as in the code of Sun et al. 2024.
_EPSILON = 1e-7


def standardize_logits(logits: jax.Array) -> jax.Array:
    """Scales the logits of every sample to mean 0 and standard deviation 1 over the classes.

    This computes n(z) = (z - mean z) / (std z + 1e-7), where the sum of squares in std is divided by C - 1. A loss on
    standardized logits transfers the order and the spacing of the teacher's logits, not their scale; any logit loss can
    be combined with it.

    Args:
      logits: Logits, float [B, C], with C >= 2.

    Returns:
      An array [B, C] of at least float32, differentiated through the mean and the deviation. Logits that are all equal
      become 0, with zero gradient.

    Raises:
      TypeError: If the logits are not floating point.
      ValueError: If they do not have 2 dimensions, or have fewer than 2 classes.

    References:
      Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024,
      https://arxiv.org/abs/2403.01993; code: https://github.com/sunshangquan/logit-standardization-KD.
    """
    check_float("logits", logits, ndim=2)
    if logits.shape[1] < 2:
        raise ValueError(f"standardize_logits needs at least 2 classes, got {logits.shape[1]}")
    logits = at_least_float32(logits)
    centered = logits - jnp.mean(logits, axis=1, keepdims=True)
    squares, whole = (jnp.sum(jnp.square(x), axis=1, keepdims=True) for x in (centered, logits))
    others = logits.shape[1] - 1
    deviation = safe_sqrt(squares / others, rounding_of_mean(whole) / others)
    return jnp.where(deviation == 0, 0, centered) / (deviation + _EPSILON)


def read_logits(inputs: LossInputs, standardize: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the logits of student and teacher, standardized by `standardize_logits` if requested."""
    student, teacher = inputs.student.logits, inputs.teacher.logits
    return (standardize_logits(student), standardize_logits(teacher)) if standardize else (student, teacher)


def is_class(labels: jax.Array, num_classes: int) -> jax.Array:
    """Returns a mask of the class of each label, bool [B, C]."""
    return jnp.arange(num_classes, dtype=jnp.int32) == labels.astype(jnp.int32)[:, None]


def decouple(logits: jax.Array, is_target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits the distribution softmax(logits) into the target against the rest, and the distribution over the rest.

    Args:
      logits: Logits, float [B, C], with C >= 2.
      is_target: Mask with one target in each row, bool [B, C].

    Returns:
      ln p_y [B], ln (1 - p_y) [B], and ln q [B, C] of the distribution q over the other classes, with 0 at the target.
    """
    all_classes = jax.nn.logsumexp(logits, axis=1)
    non_targets = jax.nn.logsumexp(jnp.where(is_target, -jnp.inf, logits), axis=1)
    target = jnp.sum(jnp.where(is_target, logits, 0), axis=1)
    among = jnp.where(is_target, 0, logits - non_targets[:, None])
    return target - all_classes, non_targets - all_classes, among


def binary_divergence(teacher: tuple[jax.Array, jax.Array], student: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Returns KL(b^t || b^s) of pairs b = (p, 1 - p), each given as (ln p, ln (1 - p)) with [B]: an array [B]."""
    (target_t, others_t), (target_s, others_s) = teacher, student
    return jnp.exp(target_t) * (target_t - target_s) + jnp.exp(others_t) * (others_t - others_s)


def masked_log_softmax(logits: jax.Array, keep: jax.Array) -> jax.Array:
    """Returns the logarithm of the softmax over the classes that `keep` marks, with 0 at all others.

    A row in which nothing is kept is 0, with zero gradient.

    Args:
      logits: Logits, float [B, C].
      keep: Mask, bool [B, C].
    """
    nothing = ~jnp.any(keep, axis=1, keepdims=True)  # The sum would be 0 and its logarithm infinite.
    total = jax.nn.logsumexp(jnp.where(keep | nothing, logits, -jnp.inf), axis=1, keepdims=True)
    return jnp.where(keep, logits - total, 0)
