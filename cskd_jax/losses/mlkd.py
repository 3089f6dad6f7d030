"""Multi-level logit distillation: single predictions, class relations and sample relations, on two views per image."""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._batch import gather_batch
from cskd_jax.losses._checks import at_least_float32, check_logits, check_temperature
from cskd_jax.losses._logits import standardize_logits
from cskd_jax.losses.base import LossInputs, Method, Positive
from cskd_jax.losses.logits import kd_loss

# Temperatures besides the configurable one. For some of them, the authors' code uses the logits of the weak view even
# where it distills the strong view.
_STRONG, _WEAK_IN_STRONG = (3.0, 5.0), (2.0, 6.0)


def class_correlation_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float, axis_name: str | None = None
) -> jax.Array:
    """Computes sum (P^t' P^t - P^s' P^s)^2 / C of the probabilities P [B, C] of the global batch at a temperature.

    Args:
      student_logits: Logits of the student, float [B, C].
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.
      temperature: Temperature of the softmax, greater than 0.
      axis_name: Name of the mapped axis over which the batch is split, static.

    Returns:
      A scalar of at least float32, the same on every device. Time is O(B C^2).
    """
    student, teacher = _probabilities(student_logits, teacher_logits, temperature, axis_name)
    return _squared_difference(student.T, teacher.T)


def sample_correlation_loss(
    student_logits: jax.Array, teacher_logits: jax.Array, *, temperature: float, axis_name: str | None = None
) -> jax.Array:
    """Computes sum (P^t P^t' - P^s P^s')^2 / B of the probabilities P [B, C] of the global batch at a temperature.

    The arguments and the return value are as for `class_correlation_loss`. Time is O(B^2 C).
    """
    return _squared_difference(*_probabilities(student_logits, teacher_logits, temperature, axis_name))


def _probabilities(student_logits, teacher_logits, temperature, axis_name):
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    student = jax.nn.softmax(at_least_float32(student_logits) / temperature)
    teacher = lax.stop_gradient(jax.nn.softmax(at_least_float32(teacher_logits) / temperature))
    return gather_batch(student, axis_name), gather_batch(teacher, axis_name)


def _squared_difference(student, teacher):
    """Returns the squared difference of the products of all pairs of rows, over the number of rows."""
    gram_s, gram_t = (jnp.dot(x, x.T, precision=lax.Precision.HIGHEST) for x in (student, teacher))
    return jnp.sum(jnp.square(gram_t - gram_s)) / len(student)


def uncertain(teacher_logits: jax.Array, *, axis_name: str | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns which samples and which classes of the global batch the teacher is least certain of.

    Args:
      teacher_logits: Logits of the teacher, float [B, C].
      axis_name: Name of the mapped axis over which the batch is split, static.

    Returns:
      Masks: samples whose largest probability is at most the median over the global batch, bool [global B], and
      classes whose probability, summed over the global batch, is at most the median over the classes, bool [C].
    """
    probabilities = jax.nn.softmax(at_least_float32(lax.stop_gradient(teacher_logits)))
    probabilities = gather_batch(probabilities, axis_name)
    # Computed once: the median of differently rounded numbers may differ from all of these.
    confidence, share = lax.optimization_barrier((jnp.max(probabilities, axis=1), jnp.sum(probabilities, axis=0)))
    return confidence <= jnp.median(confidence), share <= jnp.median(share)


def mlkd_loss(
    student_views: Sequence[jax.Array],
    teacher_views: Sequence[jax.Array],
    *,
    temperature: float = 4.0,
    standardize: bool = False,
    axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes multi-level logit distillation: KD + CC + BC, over the temperatures T of (temperature, 3, 5, 2, 6).

    KD is f_B times the sum of `kd_loss` of the weak view over all T, plus the `kd_loss` of the strong view at
    (temperature, 3, 5), plus that of the weak view at (2, 6). CC is f_C times the sum of `class_correlation_loss` of
    the weak view over all T, and BC is f_B times the same sum of `sample_correlation_loss`. f_B and f_C are the shares
    of the samples and of the classes that `uncertain` marks, about one half each.

    This is what the authors' code computes. The paper intends masks that select samples and classes, but the code
    reduces the losses to scalars before it applies the masks, so that they only scale. It uses the weak view for two
    temperatures of the strong one, and leaves out relations in the strong view.

    Args:
      student_views: Logits of the student for the weakly and the strongly augmented images, two arrays float [B, C].
      teacher_views: Logits of the teacher for the same images, two arrays float [B, C], never differentiated.
      temperature: The first of the temperatures, greater than 0; if it equals another, that one counts twice.
      standardize: Whether KD, but not CC and BC, is computed from standardized logits (see `standardize_logits`).
      axis_name: Name of the mapped axis over which the batch is split, static.

    Returns:
      A scalar and its summands `kd`, `classes` (CC) and `samples` (BC), all of at least float32. KD is a mean over the
      samples of this device; relations and shares are computed over the global batch.

    Raises:
      TypeError: If the logits are not floating point.
      ValueError: If shapes differ, or if the temperature is not positive.

    References:
      Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023; code:
      https://github.com/Jin-Ying/Multi-Level-Logit-Distillation.
    """
    (weak_s, strong_s), (weak_t, strong_t) = student_views, teacher_views
    dtype = at_least_float32(weak_s).dtype
    samples, classes = (jnp.mean(mask, dtype=dtype) for mask in uncertain(weak_t, axis_name=axis_name))
    temperatures = (temperature, *_STRONG, *_WEAK_IN_STRONG)

    def correlations(loss):
        return sum(loss(weak_s, weak_t, temperature=T, axis_name=axis_name) for T in temperatures)

    terms = {
        "classes": classes * correlations(class_correlation_loss),
        "samples": samples * correlations(sample_correlation_loss),
    }
    if standardize:
        weak_s, strong_s, weak_t, strong_t = map(standardize_logits, (weak_s, strong_s, weak_t, strong_t))
    of_weak = [kd_loss(weak_s, weak_t, temperature=T) for T in temperatures]
    of_strong = [kd_loss(strong_s, strong_t, temperature=T) for T in (temperature, *_STRONG)]
    terms["kd"] = samples * sum(of_weak) + sum(of_strong) + sum(of_weak[-len(_WEAK_IN_STRONG) :])
    return terms["kd"] + terms["classes"] + terms["samples"], terms


class MLKD(Method):
    """Applies `mlkd_loss` to the logits of two views of the images.

    Attributes:
      temperature: The first of the temperatures, greater than 0; the others are 2, 3, 5 and 6.
      standardize: Whether the logits of every sample are first scaled to mean 0 and standard deviation 1, for the
        divergences but not for the relations.
    """

    temperature: Positive = 4.0
    standardize: bool = False
    softmax: ClassVar[bool] = True
    views: ClassVar[int] = 1

    def __call__(self, inputs: LossInputs):
        if not inputs.views:
            raise ValueError("mlkd needs a second view of the images")
        strong = inputs.views[0]
        return mlkd_loss(
            (inputs.student.logits, strong.student.logits),
            (inputs.teacher.logits, strong.teacher.logits),
            temperature=self.temperature,
            standardize=self.standardize,
            axis_name=self.axis_name,
        )
