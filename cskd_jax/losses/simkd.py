"""SimKD: the student learns the teacher's last map, and predicts with the teacher's own classifier."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from cskd_jax.losses._arrays import average_pool, pool_to_common_size
from cskd_jax.losses._checks import check_averages_maps
from cskd_jax.losses._connectors import Projector
from cskd_jax.losses.base import Count, Head, LossInputs, Method, NetworkOutput
from cskd_jax.losses.fitnet import hint_loss


class SimKD(Method):
    """Applies `hint_loss` to the maps before the pooling layers, and predicts with the classifier of the teacher.

    The loss is mean (P(F^s) - F^t)^2. The projector P is a 1x1, a 3x3 and a 1x1 convolution to the teacher's channels,
    each followed by batch normalization and a ReLU. The larger map is average-pooled to the size of the smaller. The
    student predicts W mean(P(F^s)) + b, where the mean is over the positions and W, b are the classifier of the
    teacher, which is not trained; the student's own classifier is not used. For predictions, the projector normalizes
    by its running averages. The projector, its averages and a copy of W, b are kept with the student, so it needs no
    teacher to predict.

    The authors train with this loss alone: no label is read.

    Attributes:
      factor: Number by which the teacher's channels are divided, rounded down, between the projector's convolutions.

    References:
      Chen, Mei, Zhang, Wang, Feng, Chen, "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022,
      https://arxiv.org/abs/2203.14001; code: https://github.com/DefangChen/SimKD.
    """

    factor: Count = 2
    predicts: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs):
        check_averages_maps(student=inputs.student, teacher=inputs.teacher)
        student, teacher = pool_to_common_size(inputs.student.features[-1], inputs.teacher.features[-1])
        inputs.teacher_head.check(teacher.shape[-1])
        self._remember(inputs.teacher_head, student.shape[1:3])
        return hint_loss(self._project(student, teacher.shape[-1], train=True), teacher), {}

    def predict(self, student: NetworkOutput) -> jax.Array:
        """Returns the logits [B, C] of the teacher's classifier for the projected map."""
        head = Head(*(self.get_variable("memory", name) for name in Head._fields))
        features, size = student.features[-1], self.get_variable("memory", "size").shape
        projected = self._project(average_pool(features, size), head.kernel.shape[0], train=False)
        return head(jnp.mean(projected, axis=(1, 2)))

    @nn.compact
    def _project(self, x, channels, *, train):
        width = channels // self.factor
        if width < 1:
            raise ValueError(f"simkd: factor {self.factor} leaves none of the teacher's {channels} channels")
        return Projector(width, channels, self.axis_name, running=True, name="projector")(x, train=train)

    def _remember(self, head, size):
        """Keeps what a prediction needs of the teacher: its classifier, and the size to which maps are pooled."""
        for name, value in head._asdict().items():
            self.put_variable("memory", name, jnp.zeros_like(value) if self.is_initializing() else value)
        # Shapes cannot be computed from an array's values, so its own shape holds the size.
        self.put_variable("memory", "size", jnp.zeros(size))
