"""The interface of a distillation method: a linen module from the outputs of student and teacher to a loss."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

import jax
from flax import linen as nn

# Types of the settings of a loss, for which a plain float (at least 0) or int (at least 0) allows too much.
Positive = Annotated[float, "greater than 0"]
Fraction = Annotated[float, "in [0, 1)"]
Share = Annotated[float, "in [0, 1]"]
Count = Annotated[int, "at least 1"]


class NetworkOutput(Protocol):
    """The part of `cskd_jax.models.ModelOutput` that losses read."""

    @property
    def logits(self) -> jax.Array:
        """Returns the logits [B, C]."""
        ...

    @property
    def features(self) -> tuple[jax.Array, ...]:
        """Returns the maps after each stage."""
        ...

    @property
    def embedding(self) -> Any:
        """Returns the pooled last map [B, D]; None where a network does not give it."""
        ...

    @property
    def preactivations(self) -> tuple[jax.Array, ...]:
        """Returns the maps before the last ReLU of each stage."""
        ...

    @property
    def stages(self) -> tuple[jax.Array, ...]:
        """Returns the map that each stage hands on to the next part of the network."""
        ...

    @property
    def stem(self) -> Any:
        """Returns the map of the stem; None where a network does not give it."""
        ...


class FirstPhase(NamedTuple):
    """How a method trains in a first phase of its own, in which no other loss is on.

    Attributes:
      trains_network: Whether the stages of the network train, all that precedes the head and the classifier; if not,
        only what the method itself trains.
      settings: Settings of the method in that phase, which override those of a configuration.
      later: Its settings after that phase; None if it is then off.
    """

    trains_network: bool
    settings: Mapping[str, Any] = {}
    later: Mapping[str, Any] | None = None


class LossInputs(NamedTuple):
    """A batch as the methods see it.

    Attributes:
      student: Outputs of the student, which are differentiated.
      teacher: Outputs of the teacher, which are not differentiated; None where no method of the run needs a teacher.
      labels: Labels, int32 [B], or float32 [B, C] where images have several classes (multi-label).
      indices: Positions of the samples in the training split, int32 [B]; None where the batch does not carry them.
      key: Key of the random draws of this step, the same on all devices; None where nothing is drawn.
    """

    student: NetworkOutput
    teacher: NetworkOutput | Any  # Any stands for None, which no method that needs a teacher meets.
    labels: jax.Array
    indices: jax.Array | None = None
    key: jax.Array | None = None


class Method(nn.Module):
    """A term of the objective: its hyper-parameters are its fields, and whatever it trains are its variables.

    Subclasses define `__call__(inputs: LossInputs) -> (scalar, {term: scalar})` and follow the contract of the losses:
    a mean over the batch is taken over the local samples, a relation between samples over the global batch along
    `axis_name`.

    The collection "params" holds what a method trains. The collection "memory" holds what it remembers from step to
    step without training it. A method assigns new values to its memory in every call but that of `init`, and computes
    them from the global batch, so that they are equal on all devices. A draw from `inputs.key` is folded with the
    position of the sample in the global batch, so that it does not depend on the number of devices.

    Attributes:
      num_classes: Number of classes; set by the objective, not by configurations.
      axis_name: Name of the mapped axis over which the batch is split; set by the objective, not by configurations.
      num_examples: Size of the training split, 0 if unknown; set by the objective, not by configurations.
      batch_size: Number of images that the losses see at once, over all devices, 0 if unknown; the last batch of an
        epoch may have fewer. Set by the objective, not by configurations.
      needs_teacher: Whether the method reads `inputs.teacher`.
      multilabel: Kind of labels that the method reads: True for [B, C], False for [B], None if it reads no labels and
        so takes both.
      baseline: Whether a student that distills by this loss alone, beside losses of the labels, is one that other
        methods are compared with.
      parts: Parts of the loss whose contributions are studied apart: {name: the setting with its weight}.
      version: Version of the formula. It is raised when the same settings lead to other values than before, so that no
        run that was begun with the old formula is continued with the new one.
      first_phase: How the method trains in a first phase of its own; None if it has none.
    """

    num_classes: int
    axis_name: str | None = None
    num_examples: int = 0
    batch_size: int = 0
    needs_teacher: ClassVar[bool] = True
    multilabel: ClassVar[bool | None] = None
    baseline: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, str]] = {}
    version: ClassVar[int] = 1
    first_phase: ClassVar[FirstPhase | None] = None

    @property
    def frozen(self) -> tuple[str, ...]:
        """Returns the names of its parameters that neither train nor decay under its present settings."""
        return ()

    @property
    def undecayed(self) -> tuple[str, ...]:
        """Returns the names of its parameters that train, but never decay."""
        return ()
