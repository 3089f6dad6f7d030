"""Factor transfer: the teacher's last map, compressed to fewer channels."""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from cskd_jax.losses._arrays import normalize, pool_to_common_size
from cskd_jax.losses._checks import at_least_float32, check_float, check_same_batch
from cskd_jax.losses._connectors import Convolution, Normalization
from cskd_jax.losses.attention import attention_map
from cskd_jax.losses.base import FirstPhase, LossInputs, Method, Positive


def factor_transfer_loss(
    student_factor: jax.Array, teacher_factor: jax.Array, *, pool_channels: bool = True
) -> jax.Array:
    """Computes factor transfer: the mean of |n(F^s) - n(F^t)| of normalized factors.

    n(F) is the mean of the squared channels at each position, flattened and scaled to Euclidean norm 1, as in the
    reference code of CRD (Tian et al. 2020, https://github.com/HobbitLong/RepDistiller). Without `pool_channels` it is
    the flattened factor itself scaled to norm 1, as in the paper. Where the maps differ in size, the larger is first
    average-pooled to the smaller. Time and memory are O(B H W K).

    Args:
      student_factor: Factor of the student from the translator, float [B, H, W, K].
      teacher_factor: Factor of the teacher from the paraphraser, float [B, H', W', K'], with K' = K without
        `pool_channels`. It is never differentiated.
      pool_channels: Whether n averages the squared channels, static.

    Returns:
      A scalar of at least float32: the mean over the elements of n. A zero factor stays zero and has zero gradient.

    Raises:
      TypeError: If the factors are not floating point.
      ValueError: If the factors do not have 4 dimensions, if their batches differ, or if their channels differ without
        `pool_channels`.

    References:
      Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018,
      https://arxiv.org/abs/1802.04977.
    """
    check_float("student_factor", student_factor, ndim=4)
    check_float("teacher_factor", teacher_factor, ndim=4)
    check_same_batch(student_factor=student_factor, teacher_factor=teacher_factor)
    if not pool_channels and student_factor.shape[-1] != teacher_factor.shape[-1]:
        raise ValueError(
            "without pool_channels, factors must have the same number of channels, "
            f"got student {student_factor.shape}, teacher {teacher_factor.shape}"
        )
    student, teacher = pool_to_common_size(at_least_float32(student_factor), at_least_float32(teacher_factor))
    if pool_channels:
        student, teacher = attention_map(student), attention_map(teacher)
    else:
        student, teacher = (normalize(factor.reshape(len(factor), -1)) for factor in (student, teacher))
    return jnp.mean(jnp.abs(student - lax.stop_gradient(teacher)))


class ConvolutionStack(nn.Module):
    """A stack of 3x3 convolutions with bias, each followed by a leaky ReLU of slope 0.1.

    Attributes:
      widths: Numbers of output channels of the convolutions.
      normalize: Whether batch normalization follows each convolution.
      axis_name: Name of the mapped axis over which the batch is split, or None.
    """

    widths: tuple[int, ...]
    normalize: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x [B, H, W, D] to [B, H, W, widths[-1]]."""
        for layer, width in enumerate(self.widths, start=1):
            x = Convolution(width, 3, name=f"layer{layer}")(x)
            x += self.param(f"bias{layer}", nn.initializers.zeros, (width,), x.dtype)
            if self.normalize:
                x = Normalization(self.axis_name, name=f"normalization{layer}")(x)
            x = nn.leaky_relu(x, 0.1)
        return x


class FactorTransfer(Method):
    """Applies `factor_transfer_loss` to the last stage, with a trainable paraphraser and translator.

    The paraphraser is an autoencoder of the teacher's last map: three 3x3 convolutions to rate * channels (the factor)
    and three back. The translator consists of three convolutions, each with batch normalization, from the student's
    last map to the same number of channels. No gradient of the transfer term reaches the paraphraser, and no gradient
    of its reconstruction reaches the student.

    The paper, and the reference code of CRD (Tian et al. 2020, https://github.com/HobbitLong/RepDistiller), first train
    the paraphraser alone and then keep it fixed. The recipes do the same by setting `trains` in each of the two phases.

    Attributes:
      rate: Channels of the factor, as a fraction of the teacher's.
      pool_channels: Whether the factor is the mean of the squared channels at each position; None is True unless the
        maps are 1x1, where a single position scaled to norm 1 would always be 1 and transfer nothing.
      trains: What the loss trains: "paraphraser", where its value is the mean squared error of the reconstruction;
        "student" with the translator, where it is the transfer; or "both" at once, for training in a single phase,
        where it is transfer + reconstruction_weight * reconstruction.
      reconstruction_weight: Weight of the reconstruction relative to the transfer where both are trained; the default,
        1/200, makes it 1 at the usual weight of this loss, 200.
    """

    rate: Positive = 0.5
    pool_channels: bool | None = None
    trains: Literal["both", "paraphraser", "student"] = "both"
    reconstruction_weight: float = 0.005
    version: ClassVar[int] = 2
    first_phase: ClassVar[FirstPhase | None] = FirstPhase(False, {"trains": "paraphraser"}, {"trains": "student"})

    @property
    def frozen(self) -> tuple[str, ...]:
        """Returns the parts that `trains` leaves unchanged."""
        return {"both": (), "paraphraser": ("translator",), "student": ("encoder", "decoder")}[self.trains]

    @nn.compact
    def __call__(self, inputs: LossInputs):
        student, teacher = inputs.student.stages[-1], lax.stop_gradient(inputs.teacher.stages[-1])
        channels = teacher.shape[-1]
        width = int(channels * self.rate)
        if width < 1:
            raise ValueError(f"rate {self.rate} leaves none of the teacher's {channels} channels")
        factor = ConvolutionStack((channels, width, width), name="encoder")(teacher)
        reconstructed = ConvolutionStack((width, channels, channels), name="decoder")(factor)
        translator = ConvolutionStack((student.shape[-1], width, width), True, self.axis_name, name="translator")
        pool_channels = self.pool_channels
        if pool_channels is None:
            pool_channels = min(student.shape[1], teacher.shape[1]) * min(student.shape[2], teacher.shape[2]) > 1
        terms = {
            "transfer": factor_transfer_loss(translator(student), factor, pool_channels=pool_channels),
            "reconstruction": jnp.mean(jnp.square(reconstructed - teacher.astype(reconstructed.dtype))),
        }
        if self.trains == "student":
            return terms["transfer"], {}
        if self.trains == "paraphraser":
            return terms["reconstruction"], {}
        return terms["transfer"] + self.reconstruction_weight * terms["reconstruction"], terms
