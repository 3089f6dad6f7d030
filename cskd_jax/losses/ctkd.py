"""Curriculum temperature: a temperature that is trained against the student, increasingly from epoch to epoch."""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._arrays import half_cosine
from cskd_jax.losses._checks import at_least_float32
from cskd_jax.losses._logits import read_logits
from cskd_jax.losses.base import Count, LossInputs, Method, Positive, Signed
from cskd_jax.losses.dkd import dkd_loss
from cskd_jax.losses.logits import kd_loss


def curriculum_temperature(
    raw: jax.Array, factor: jax.Array | float = 1.0, *, start: float = 1.0, span: float = 20.0
) -> jax.Array:
    """Computes a temperature between two bounds from a trained number, with a scaled gradient.

    Args:
      raw: Trained number g, a float scalar.
      factor: Factor of the gradient of g; a negative factor turns descent into ascent.
      start: Lower bound of the temperature, greater than 0.
      span: Difference of the bounds, greater than 0.

    Returns:
      The scalar start + span sigmoid(g).

    Raises:
      ValueError: If a bound is out of range.

    References:
      Li, Li, Yang, Zhao, Song, Luo, Li, Yang, "Curriculum Temperature for Knowledge Distillation", AAAI 2023,
      https://arxiv.org/abs/2211.16231; code: https://github.com/zhengli97/CTKD.
    """
    for name, value in (("start", start), ("span", span)):
        if not value > 0:
            raise ValueError(f"{name} must be greater than 0, got {value}")
    fixed = lax.stop_gradient(raw)
    return start + span * jax.nn.sigmoid(fixed + factor * (raw - fixed))


def curriculum_factor(
    epoch: jax.Array, *, loops: int = 10, maximum: float = 0.0, minimum: float = -1.0, schedule: str = "cosine"
) -> jax.Array:
    """Computes the factor of the gradient of the temperature in an epoch.

    Args:
      epoch: Number of the epoch, an integer array that counts from 1.
      loops: Number of epochs n over which the factor changes, at least 1.
      maximum: Factor at the start.
      minimum: Factor at the end.
      schedule: "cosine" goes from `maximum` to `minimum` along half a cosine, by the start of epoch n. "linear" is
        -(maximum - minimum) / n min(epoch, n - 1), which starts at 0 whatever `maximum` is and ends a step early, as
        in the authors' code.

    Returns:
      An array of floats in the shape of `epoch`.

    Raises:
      ValueError: If loops is less than 1, or the schedule is unknown.
    """
    if loops < 1:
        raise ValueError(f"loops must be at least 1, got {loops}")
    if schedule == "cosine":
        return (maximum - minimum) * half_cosine(epoch, loops) + minimum
    if schedule == "linear":
        return -(maximum - minimum) / loops * jnp.minimum(epoch, loops - 1).astype(float)
    raise ValueError(f"schedule must be cosine or linear, got {schedule}")


class CTKD(Method):
    """Applies `kd_loss` or `dkd_loss` at the temperature of `curriculum_temperature`, which is trained against them.

    Attributes:
      variant: Loss at that temperature, "kd" or "dkd".
      start: Lower bound of the temperature, greater than 0.
      span: Difference of its bounds, greater than 0; training starts at start + 0.73 span.
      loops: Number of epochs over which the factor of its gradient goes from `maximum` to `minimum`.
      maximum: Factor of that gradient before the first epoch.
      minimum: Factor of that gradient from epoch `loops` on; negative to make the temperature maximize the loss.
      schedule: Transition from `maximum` to `minimum`, "cosine" or "linear".
      alpha: Weight of the target class, for dkd.
      beta: Weight of the other classes, for dkd.
      standardize: Whether the logits of every sample are first scaled to mean 0 and standard deviation 1.
    """

    variant: Literal["kd", "dkd"] = "kd"
    start: Positive = 1.0
    span: Positive = 20.0
    loops: Count = 10
    maximum: Signed = 0.0
    minimum: Signed = -1.0
    schedule: Literal["cosine", "linear"] = "cosine"
    alpha: float = 1.0
    beta: float = 2.0
    standardize: bool = False
    softmax: ClassVar[bool] = True

    @property
    def reads_labels(self) -> bool:
        """Returns whether its loss separates the target class."""
        return self.variant == "dkd"

    @nn.compact
    def __call__(self, inputs: LossInputs):
        student, teacher = read_logits(inputs, self.standardize)
        dtype = at_least_float32(student).dtype
        raw = self.param("temperature", nn.initializers.ones, (), dtype)
        factor = curriculum_factor(
            inputs.epoch + 1,
            loops=self.loops,
            maximum=self.maximum,
            minimum=self.minimum,
            schedule=self.schedule,
        )
        temperature = curriculum_temperature(raw, factor.astype(dtype), start=self.start, span=self.span)
        terms = {"temperature": lax.stop_gradient(temperature)}
        if self.variant == "kd":
            return kd_loss(student, teacher, temperature=temperature), terms
        weights = {"alpha": self.alpha, "beta": self.beta}
        value, parts = dkd_loss(student, teacher, inputs.labels, temperature=temperature, **weights)
        return value, terms | parts
