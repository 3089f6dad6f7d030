"""The interface of a distillation method: a linen module from the outputs of student and teacher to a loss."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import jax
from flax import linen as nn

from cskd_jax.losses._checks import at_least_float32

# Types of settings whose range is not that of a plain float or int, which is at least 0.
Positive = Annotated[float, "greater than 0"]
Fraction = Annotated[float, "in [0, 1)"]
Share = Annotated[float, "in [0, 1]"]
Count = Annotated[int, "at least 1"]
Signed = Annotated[float, "any finite number"]
# The student features that an embedding loss reads: the classifier's input, or the mean of the last stage.
EmbeddingSource = Literal["embedding", "tokens"]


class NetworkOutput(Protocol):
    """The part of `cskd_jax.models.ModelOutput` that losses read."""

    @property
    def logits(self) -> jax.Array:
        """Returns the logits [B, C]."""
        ...

    @property
    def head_logits(self) -> tuple[jax.Array, ...]:
        """Returns the logits of each head, whose mean is `logits`; empty for a network with one head."""
        ...

    @property
    def members(self) -> tuple[Any, ...]:
        """Returns the outputs of each of several networks, which `logits` combine; empty for a single network."""
        ...

    @property
    def features(self) -> tuple[jax.Array, ...]:
        """Returns the maps after each stage."""
        ...

    @property
    def embedding(self) -> Any:
        """Returns the pooled last map [B, D]; None where a network does not provide it."""
        ...

    @property
    def preactivations(self) -> tuple[jax.Array, ...]:
        """Returns the maps before the last ReLU of each stage."""
        ...

    @property
    def tokens(self) -> tuple[tuple[jax.Array, ...], Any]:
        """Returns the tokens [B, T, D] of each stage and their `TokenGrid`; empty and None for a network of maps."""
        ...

    @property
    def stages(self) -> tuple[jax.Array, ...]:
        """Returns the map that each stage passes on to the next part of the network."""
        ...

    @property
    def stem(self) -> Any:
        """Returns the map of the stem; None where a network does not provide it."""
        ...


class Head(NamedTuple):
    """The classifier of a network, a linear layer on the pooled last map.

    Attributes:
      kernel: Weights, [D, C].
      bias: Biases, [C].
    """

    kernel: jax.Array
    bias: jax.Array

    def __call__(self, features: jax.Array) -> jax.Array:
        """Returns the logits [..., C] of pooled features [..., D], in at least float32."""
        self.check(features.shape[-1])
        kernel, bias = at_least_float32(self.kernel), at_least_float32(self.bias)
        return at_least_float32(features).astype(kernel.dtype) @ kernel + bias

    def check(self, channels: int) -> None:
        """Raises ValueError unless the classifier takes the channel means of a map as input."""
        if channels != self.kernel.shape[0]:
            raise ValueError(
                f"a classifier of {self.kernel.shape[0]} features is applied to a map of {channels} channels; it "
                "must be the linear layer that follows the mean over the positions of that map"
            )


class Norm(NamedTuple):
    """The trained scale and offset of a batch normalization, the same in training and evaluation mode.

    Attributes:
      scale: Factor of the normalized map, [D].
      bias: Offset, [D].
    """

    scale: jax.Array
    bias: jax.Array


class FirstPhase(NamedTuple):
    """How a method trains in a first phase of its own, in which no other loss is active.

    Attributes:
      trains_network: Whether the stages of the network train, that is, everything before the head and the classifier;
        if not, only the method's own parameters train.
      settings: Settings of the method in that phase, which override those of a configuration.
      later: Settings of the method after that phase; None if it is off from then on.
    """

    trains_network: bool
    settings: Mapping[str, Any] = {}
    later: Mapping[str, Any] | None = None


class View(NamedTuple):
    """The outputs of the networks for another augmented version of the images of a batch.

    Attributes:
      student: Outputs of the student, which are differentiated.
      teacher: Outputs of the teacher, which are not differentiated; None where no loss reads a teacher.
      average: Outputs of the moving average of the student, which are not differentiated; None where no loss reads it.
    """

    student: NetworkOutput
    teacher: NetworkOutput | Any
    average: NetworkOutput | Any = None


class Mixed(NamedTuple):
    """How the images of a batch were mixed with others.

    Attributes:
      labels: Labels of the other images, int32 [B].
      share: Share of each image in its mixture, float32 [B]; the rest comes from the other image.
    """

    labels: jax.Array
    share: jax.Array


class LossInputs(NamedTuple):
    """A batch as the methods see it.

    Attributes:
      student: Outputs of the student, which are differentiated.
      teacher: Outputs of the teacher, which are not differentiated; None where no method of the run needs a teacher.
      labels: Labels, int32 [B], or float32 [B, C] where an image may have several classes (multi-label).
      indices: Positions of the samples in the training split, int32 [B]; None where the batch does not carry them.
      key: Key of the random draws of this step, the same on all devices; None where nothing is drawn.
      student_head: Classifier of the student, which is differentiated; None where a network does not provide it.
      teacher_head: Classifier of the teacher, which is not differentiated; None where a network does not provide it.
      teacher_norms: Batch normalizations before the last ReLU of each stage of the teacher, whose outputs (on the
        residual branch, if there is one) make its preactivations; None where a network does not provide them.
      epoch: The epoch, an int32 scalar, counted from the `start_epoch` of the loss and 0 before it; set by the
        objective.
      views: Further augmented versions of the same images, as many as the most demanding loss of the run needs.
      mixed: How the images were mixed with each other; None if they were not mixed. `labels` are then the labels of the
        images before mixing.
      average: Outputs of the moving average of the student before the step, in evaluation mode, which are not
        differentiated; None unless a loss of the run has teacher="average".
    """

    student: NetworkOutput
    teacher: NetworkOutput | Any  # Any stands for None, which no method that needs a teacher ever sees.
    labels: jax.Array
    indices: jax.Array | None = None
    key: jax.Array | None = None
    student_head: Head | Any = None
    teacher_head: Head | Any = None
    teacher_norms: tuple[Norm, ...] | Any = None
    epoch: jax.Array | Any = None  # Any stands for None, which no method ever sees.
    views: tuple[View, ...] = ()
    mixed: Mixed | None = None
    average: NetworkOutput | Any = None


class Method(nn.Module):
    """A term of the objective: its hyperparameters are its fields, and whatever it trains is in its variables.

    Subclasses define `__call__(inputs: LossInputs)`, which returns a scalar, or a scalar and {term: scalar} for the
    log, and follow the contract of the losses: a mean over the batch is taken over the local samples, a relation
    between samples over the global batch along `axis_name`.

    The collection "params" holds what a method trains. The collection "memory" holds what it remembers from step to
    step without training it. A method assigns new values to its memory in every call except `init`, and computes them
    from the global batch, so that they are equal on all devices. A draw from `inputs.key` is folded with the position
    of the sample in the global batch, so that it does not depend on the number of devices.

    Attributes:
      num_classes: Number of classes; set by the objective, not by configurations.
      axis_name: Name of the mapped axis over which the batch is split; set by the objective, not by configurations.
      num_examples: Size of the training split, 0 if unknown; set by the objective, not by configurations.
      batch_size: Number of images that the losses see at once, over all devices, 0 if unknown; the last batch of an
        epoch may have fewer. Set by the objective, not by configurations.
      teacher: Which teacher `inputs.teacher` is: the number of one of several, from 0; "average" for the moving average
        of the student; None for all teachers as one.
      needs_teacher: Whether the method reads `inputs.teacher`.
      multilabel: Kind of labels that the method is for: True for [B, C], False for [B], None for both.
      softmax: Whether the method, even if it reads no labels, compares probabilities of a softmax over the classes,
        which images with any number of classes (multi-label) do not have. A method may make it a property that depends
        on its settings.
      mixes: Whether the method takes `inputs.mixed` into account where it reads labels.
      supervises: Whether the loss depends on the labels alone, so that a student trained only by such losses learns
        without distillation.
      baseline: Whether a student trained by this loss and otherwise only by losses on the labels is a baseline that
        other methods are compared with.
      parts: Parts of the loss whose contributions are studied separately: {name: the setting with its weight}.
      predicts: Whether the method replaces the prediction of the student with that of `predict`.
      version: Version of the formula. It is increased when the same settings lead to different values than before, so
        that no run started with the old formula is continued with the new one.
      views: Number of `inputs.views` that the method needs, each of which is a forward pass of both networks.
      first_phase: How the method trains in a first phase of its own; None if it has none.
    """

    num_classes: int
    axis_name: str | None = None
    num_examples: int = 0
    batch_size: int = 0
    teacher: int | str | None = None
    needs_teacher: ClassVar[bool] = True
    multilabel: ClassVar[bool | None] = None
    softmax: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    supervises: ClassVar[bool] = False
    baseline: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, str]] = {}
    predicts: ClassVar[bool] = False
    version: ClassVar[int] = 1
    views: ClassVar[int] = 0
    first_phase: ClassVar[FirstPhase | None] = None

    @property
    def reads_labels(self) -> bool:
        """Returns whether the method reads labels under the current settings."""
        return self.multilabel is not None

    @property
    def frozen(self) -> tuple[str, ...]:
        """Returns the names of the parameters that neither train nor decay under the current settings."""
        return ()

    @property
    def undecayed(self) -> tuple[str, ...]:
        """Returns the names of the parameters that train but never decay."""
        return ()

    @property
    def num_peers(self) -> int:
        """Returns the number of networks like the student that must be trained with it."""
        return 0

    def predict(self, student: NetworkOutput) -> jax.Array:
        """Returns the logits [B, C] with which a student of this method predicts, if `predicts` is set.

        It reads the outputs of the student in evaluation mode, and the variables of the method, which checkpoints keep
        along with those of the student; no teacher is needed.
        """
        raise NotImplementedError(f"{type(self).__name__} does not predict")
