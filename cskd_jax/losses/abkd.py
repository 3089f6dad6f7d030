"""Distillation by the alpha-beta divergence, which has several divergences as special cases and limits."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from cskd_jax.losses._checks import at_least_float32, check_float, check_logits, check_same_shape, check_temperature
from cskd_jax.losses._logits import read_logits
from cskd_jax.losses.base import LossInputs, Method, Positive, Signed

# This number is added to the probability in the logarithm of an entropy, as in the authors' code.
_EPSILON = 1e-10


def abkd_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    temperature: float = 4.0,
    released_limits: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the alpha-beta divergence between the distributions p of the teacher and q of the student.

    The divergence is -1/(a b) sum over c of p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b), with p and q the softmax of z
    / T, and its limits where a, b or a + b is 0: it approaches KL(p || q) at a = 1, b = 0, KL(q || p) at a = 0, b = 1,
    and half the sum of (ln q - ln p)^2 at a = b = 0. There is no factor T^2. Time and memory are O(B C).

    Args:
      student_logits: Logits of the student, float [B, C]. A class that has an infinite logit in either network is left
        out.
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.
      alpha: Exponent a.
      beta: Exponent b. With a negative exponent, tiny probabilities make the value huge, and infinite or NaN where it
        exceeds the largest number of the dtype.
      temperature: Temperature T, greater than 0.
      released_limits: Whether the value where b or a + b is 0 is multiplied by a, and where a is 0 by b, as in the
        authors' code; the loss is then discontinuous there, unless that factor is 1.

    Returns:
      A scalar, the mean over the batch, and the terms `entropy` and `entropy_tempered`, the mean entropies of the
      student without and with the temperature, all of at least float32.

    Raises:
      TypeError: If the logits are not floating point.
      ValueError: If shapes differ, or if the temperature is not positive.

    References:
      Wang, Yang, Wang, Wang, Xu, Huang, "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge
      Distillation via alpha-beta-Divergence", ICML 2025, https://arxiv.org/abs/2505.04560; code:
      https://github.com/ghwang-s/abkd.
    """
    check_logits(student_logits, teacher_logits)
    check_temperature(temperature)
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits)
    divergence = _divergences(student / temperature, teacher / temperature, alpha, beta)
    if released_limits:
        divergence = _released_factor(alpha, beta) * divergence
    entropies = {"entropy": _entropy(student), "entropy_tempered": _entropy(student / temperature)}
    return jnp.mean(divergence), entropies


def abkd_tokens_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    padding: int = -100,
) -> jax.Array:
    """Computes the alpha-beta divergence of `abkd_loss` for sequences of tokens, with T = 1.

    Args:
      student_logits: Logits of the student, float [B, S, V].
      teacher_logits: Logits of the teacher, float [B, S, V], never differentiated.
      labels: Labels of the tokens, int [B, S].
      alpha: Exponent a.
      beta: Exponent b.
      padding: Label that marks tokens that do not count.

    Returns:
      A scalar of at least float32: the mean over the tokens that count, 0 if there is none.

    Raises:
      TypeError: If the logits are not floating point, or the labels are not integers.
      ValueError: If shapes do not fit.

    References:
      See `abkd_loss`.
    """
    check_float("student_logits", student_logits, ndim=3)
    check_float("teacher_logits", teacher_logits, ndim=3)
    check_same_shape(student_logits=student_logits, teacher_logits=teacher_logits)
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"labels must have an integer dtype, got {jnp.result_type(labels)}")
    if jnp.shape(labels) != student_logits.shape[:2]:
        raise ValueError(f"labels must have shape {student_logits.shape[:2]}, got {jnp.shape(labels)}")
    divergence = _divergences(at_least_float32(student_logits), at_least_float32(teacher_logits), alpha, beta)
    counts = labels != padding
    number = jnp.maximum(jnp.sum(counts, dtype=divergence.dtype), 1)
    return jnp.sum(jnp.where(counts, divergence, 0)) / number


def _divergences(student, teacher, alpha, beta):
    """Returns the divergence along the last axis.

    With g_k(x, y) = (e^(k y) - e^(k x)) / k, and y - x at k = 0, it is the sum over c of (g_{a+b}(x, y) - e^(a x)
    g_b(x, y)) / a for x = ln p, y = ln q. This formula has no division by b or a + b, and the one with the roles of p
    and q exchanged has no division by a. So the only limit that needs a branch is a = b = 0.
    """
    left_out = jnp.isinf(student) | jnp.isinf(teacher)
    p = jnp.where(left_out, 0, jax.nn.log_softmax(lax.stop_gradient(teacher)))
    q = jnp.where(left_out, 0, jax.nn.log_softmax(student))
    if alpha == beta == 0:
        return jnp.sum(jnp.square(q - p), axis=-1) / 2
    if abs(alpha) < abs(beta):
        alpha, beta, p, q = beta, alpha, q, p
    difference = _power_difference(alpha + beta, p, q) - _power_difference(beta, p, q, shift=alpha * p)
    return jnp.sum(difference, axis=-1) / alpha


def _power_difference(power, x, y, shift=0.0):
    """Returns e^shift (e^(power y) - e^(power x)) / power, and e^shift (y - x) at power 0.

    The result has full precision where the two powers are close. The shift is added to the exponents: with powers of
    opposite signs, e^shift may vanish where the others are infinite.
    """
    if power == 0:
        return jnp.exp(shift) * (y - x)
    exponent = power * (y - x)
    close = jnp.abs(exponent) < 1
    near = jnp.exp(shift + power * x) * jnp.expm1(jnp.where(close, exponent, 0))
    return jnp.where(close, near, jnp.exp(shift + power * y) - jnp.exp(shift + power * x)) / power


def _released_factor(alpha, beta):
    if alpha == beta == 0:
        return 1.0
    if alpha == 0:
        return beta
    return alpha if beta == 0 or alpha + beta == 0 else 1.0


def _entropy(logits):
    probabilities = lax.stop_gradient(jax.nn.softmax(logits))
    return -jnp.mean(jnp.sum(probabilities * jnp.log(probabilities + _EPSILON), axis=1))


class ABKD(Method):
    """Applies `abkd_loss` to the logits.

    Attributes:
      alpha: Exponent of the teacher's probabilities, of either sign.
      beta: Exponent of the student's probabilities, of either sign.
      temperature: Temperature of the softmax, greater than 0.
      standardize: Whether the logits of every sample are first scaled to mean 0 and standard deviation 1; the loss is
        then also multiplied by the squared temperature, as in the authors' code.
      released_limits: Whether the limits at which alpha, beta or their sum is 0 have the factors of the authors' code,
        which make the loss discontinuous there.
    """

    alpha: Signed = 0.5
    beta: Signed = 0.5
    temperature: Positive = 4.0
    standardize: bool = False
    released_limits: bool = False
    softmax: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs):
        value, terms = abkd_loss(
            *read_logits(inputs, self.standardize),
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            released_limits=self.released_limits,
        )
        return (self.temperature**2 * value if self.standardize else value), terms
