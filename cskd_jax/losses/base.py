"""What a distillation method is: a linen module from the outputs of student and teacher to a loss."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, NamedTuple, Protocol

import jax
from flax import linen as nn

# Types of the settings of a loss, for which a plain float (at least 0) or int (at least 0) allows too much.
Positive = Annotated[float, "greater than 0"]
Fraction = Annotated[float, "in [0, 1)"]
Share = Annotated[float, "in [0, 1]"]
Count = Annotated[int, "at least 1"]


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
      labels: int32 [B], or float32 [B, C] where images have several categories (multi-label).
      indices: int32 [B], positions of the samples in the training split; None where the batch does not say.
      key: of the random draws of this step, the same on all devices; None in uses without draws.
    """

    student: NetworkOutput
    teacher: NetworkOutput | None
    labels: jax.Array
    indices: jax.Array | None = None
    key: jax.Array | None = None


class Method(nn.Module):
    """A term of the objective, with its hyper-parameters as fields and whatever it trains as its variables.

    Subclasses define `__call__(inputs: LossInputs) -> (scalar, {term: scalar})` and follow the contract of the losses:
    a batch mean is of the local samples, a relation is of the global batch over `axis_name`.

    What a method trains are its "params". What it has to remember from step to step without training it are its
    variables of the collection "memory"; it assigns their new values, computed from the global batch so that they are
    equal on all devices, in every call but that of `init`. A draw from `inputs.key` is folded with the position of
    the sample in the global batch, so that it does not depend on the number of devices.

    Attributes:
      num_classes: size of the label set; set by the objective, not by configurations.
      axis_name: mapped axis over which the batch is split; set by the objective, not by configurations.
      num_examples: size of the training split, 0 if unknown; set by the objective, not by configurations.
      needs_teacher: whether `inputs.teacher` is read.
      multilabel: which labels the method is for: True [B, C], False [B]; None: it reads none and takes both.
      baseline: Whether a student that distills by this loss alone, beside losses of the labels, is one that other
        methods are compared with.
      parts: Parts of the loss whose contributions are studied apart: {name: the setting with its weight}.
      version: Version of the formula. It is raised when the same settings lead to other values than before, so that no
        run that was begun with the old formula is continued with the new one.
    """

    num_classes: int
    axis_name: str | None = None
    num_examples: int = 0
    needs_teacher: ClassVar[bool] = True
    multilabel: ClassVar[bool | None] = None
    baseline: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, str]] = {}
    version: ClassVar[int] = 1
