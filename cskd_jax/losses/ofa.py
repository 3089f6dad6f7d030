"""One for all: every stage of the student predicts, and learns the teacher's prediction with a reinforced target."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from cskd_jax.convolution import convolve
from cskd_jax.losses._checks import at_least_float32, check_labels, check_logits, check_temperature
from cskd_jax.losses._connectors import Normalization, Pointwise
from cskd_jax.losses._token_exits import TokenExit
from cskd_jax.losses.base import LossInputs, Method, Positive

# The initializers of the authors' code.
_of_convolution = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_of_classifier = nn.initializers.normal(0.02)


def ofa_loss(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    labels: jax.Array,
    *,
    epsilon: float = 1.0,
    temperature: float = 1.0,
) -> jax.Array:
    """Computes one-for-all distillation of logits: -sum over c of ((q_c + [c = y])^e - [c = y]) ln p_c.

    Here q and p are the softmax of the teacher's and the student's logits divided by T, y is the label, and e is
    `epsilon`. With e = 1 this is the cross-entropy of the student with the teacher; a larger e gives more weight to the
    label, and the more so the surer the teacher is of it. There is no factor T^2. Time and memory are O(B C).

    Args:
      student_logits: Logits of the student, float [B, C].
      teacher_logits: Logits of the teacher, float [B, C], never differentiated.
      labels: Labels, int [B], in [0, C).
      epsilon: Exponent e, greater than 0.
      temperature: Temperature T, greater than 0.

    Returns:
      A scalar of at least float32: the mean over the batch.

    Raises:
      TypeError: If the logits are not floating point, or the labels not integers.
      ValueError: If shapes do not fit, or if the exponent or the temperature is not positive.

    References:
      Hao, Guo, Han, Tang, Hu, Wang, Xu, "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge
      Distillation", NeurIPS 2023, https://arxiv.org/abs/2310.19444; code: https://github.com/Hao840/OFAKD.
    """
    check_logits(student_logits, teacher_logits)
    check_labels(labels, len(student_logits))
    check_temperature(temperature)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be greater than 0, got {epsilon}")
    log_s = jax.nn.log_softmax(at_least_float32(student_logits) / temperature)
    teacher = jax.nn.softmax(lax.stop_gradient(at_least_float32(teacher_logits)) / temperature)
    target = jax.nn.one_hot(labels, teacher.shape[1], dtype=teacher.dtype)
    return -jnp.mean(jnp.sum(((teacher + target) ** epsilon - target) * log_s, axis=1))


class SeparableBlock(nn.Module):
    """A block that halves a map: a 3x3 depthwise and a 1x1 convolution, batch normalization and ReLU, twice.

    Attributes:
      features: Number of output channels; the first half of the block keeps the number of input channels.
      axis_name: Name of the mapped axis over which the batch is split, or None.
      running: Whether running averages are kept (see `Normalization`).
    """

    features: int
    axis_name: str | None = None
    running: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, D] to [B, ceil(H / 2), ceil(W / 2), features]."""
        x = x.astype(np.promote_types(x.dtype, np.float32))
        for half, (stride, width) in enumerate(((2, x.shape[-1]), (1, self.features)), start=1):
            shape = (3, 3, 1, x.shape[-1])
            kernel = self.param(f"depthwise{half}", _of_convolution, shape, x.dtype)
            x = convolve(x, kernel, stride, 1, groups=x.shape[-1])
            x = Pointwise(width, kernel_init=_of_convolution, name=f"pointwise{half}")(x)
            x = nn.relu(Normalization(self.axis_name, running=self.running, name=f"normalization{half}")(x))
        return x


class Exit(nn.Module):
    """A classifier of the map of a stage.

    Attributes:
      num_classes: Number of classes.
      features: Number of features that are classified.
      blocks: Number of `SeparableBlock`s, each with twice the channels of the previous one, the last with `features`.
        With 0 blocks, a 1x1 convolution with bias maps to `features`.
      axis_name: Name of the mapped axis over which the batch is split, or None.
      running: Whether running averages are kept (see `Normalization`).
    """

    num_classes: int
    features: int
    blocks: int
    axis_name: str | None = None
    running: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, D] to logits [B, num_classes]."""
        channels = x.shape[-1]
        for number in range(1, self.blocks + 1):
            width = self.features if number == self.blocks else channels * 2**number
            x = SeparableBlock(width, self.axis_name, self.running, name=f"block{number}")(x)
        if not self.blocks:
            x = Pointwise(self.features, use_bias=True, kernel_init=_of_convolution, name="pointwise")(x)
        x = jnp.mean(x, axis=(1, 2))
        return Pointwise(self.num_classes, use_bias=True, kernel_init=_of_classifier, name="classifier")(x)


class OFA(Method):
    """Applies `ofa_loss` to the logits, and to those of a trained exit from every stage of the student.

    The value is kd_weight ofa(z) + exit_weight sum over stages of ofa(z_l). An exit halves the map by separable
    convolutions once for every stage that follows, averages it over the positions, and classifies as many features as
    the wider of the two networks' embeddings has. For a student that outputs tokens, the exit is a `TokenExit` with as
    many blocks as stages follow, but at least one. No map of the teacher is read.

    Attributes:
      epsilon: Exponent that strengthens the target, greater than 0; the authors use 1.5 for ImageNet.
      temperature: Temperature of the softmax, greater than 0.
      kd_weight: Weight of the loss on the student's own logits.
      exit_weight: Weight of the sum of the losses over the exits.
    """

    epsilon: Positive = 1.0
    temperature: Positive = 1.0
    kd_weight: float = 1.0
    exit_weight: float = 1.0
    multilabel: ClassVar[bool] = False

    @nn.compact
    def __call__(self, inputs: LossInputs):
        def loss(logits):
            settings = {"epsilon": self.epsilon, "temperature": self.temperature}
            return ofa_loss(logits, inputs.teacher.logits, inputs.labels, **settings)

        exits = jnp.zeros((), at_least_float32(inputs.student.logits).dtype)
        for leave in self._exits(inputs):
            exits += loss(leave)
        logits = loss(inputs.student.logits)
        return self.kd_weight * logits + self.exit_weight * exits, {"logits": logits, "exits": exits}

    def _exits(self, inputs):
        """Yields the logits of the exit of every stage."""
        tokens, grid = inputs.student.tokens
        if grid is not None:
            for stage, of_stage in enumerate(tokens, start=1):
                blocks = max(len(tokens) - stage, 1)
                yield TokenExit(self.num_classes, blocks, name=f"exit{stage}")(of_stage, grid)
            return
        stages, width = inputs.student.stages, self._width(inputs)
        for stage, features in enumerate(stages, start=1):
            blocks = len(stages) - stage
            yield Exit(self.num_classes, width, blocks, self.axis_name, name=f"exit{stage}")(features)

    def _width(self, inputs):
        """Returns the number of features of the exits, which is read from their parameters once they exist."""
        if self.is_initializing():
            return max(inputs.student.embedding.shape[-1], inputs.teacher.embedding.shape[-1])
        # In training, a loss is not given outputs that it does not compute with, so the embedding may be missing here.
        return self.get_variable("params", "exit1")["classifier"]["kernel"].shape[0]
