"""What a distillation method is: a linen module from the outputs of student and teacher to a loss."""

from typing import ClassVar, NamedTuple, Protocol

import jax
from flax import linen as nn


class NetworkOutput(Protocol):
    """The part of `cskd_jax.models.ModelOutput` that losses read."""

    logits: jax.Array
    features: tuple[jax.Array, ...]
    embedding: jax.Array
    preactivations: tuple[jax.Array, ...]


class LossInputs(NamedTuple):
    """One batch as the methods see it.

    Attributes:
      student: outputs of the student, differentiated.
      teacher: outputs of the teacher, not differentiated; None where no method of the run needs a teacher.
      labels: int32 [B].
    """

    student: NetworkOutput
    teacher: NetworkOutput | None
    labels: jax.Array


class Method(nn.Module):
    """A term of the objective, with its hyper-parameters as fields and whatever it trains as its variables.

    Subclasses define `__call__(inputs: LossInputs) -> (scalar, {term: scalar})` and follow the contract of the losses:
    a batch mean is of the local samples, a relation is of the global batch over `axis_name`.

    Attributes:
      num_classes: size of the label set; set by the objective, not by configurations.
      axis_name: mapped axis over which the batch is split; set by the objective, not by configurations.
      needs_teacher: whether `inputs.teacher` is read.
    """

    num_classes: int
    axis_name: str | None = None
    needs_teacher: ClassVar[bool] = True
