"""Everything that training changes, in one tree."""

from functools import partial
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from cskd_jax.losses import LossInputs
from cskd_jax.models import ModelOutput
from cskd_jax.training.objective import Objective

_ONE_CATEGORY = jax.ShapeDtypeStruct((), jnp.int32)


@flax.struct.dataclass
class TrainState:
    """State of a training run.

    Attributes:
      step: int32, optimization steps done.
      params: {"student": parameters of the network, "methods": {name: what the method trains}}.
      batch_stats: running statistics of the student.
      opt_state: of the optimizer over all of params.
      memory: {name: what the method remembers from step to step without training it}; empty for most methods.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    memory: Any = flax.struct.field(default_factory=dict)

    @property
    def student_variables(self) -> dict[str, Any]:
        """What `student.apply` takes."""
        return {"params": self.params["student"], "batch_stats": self.batch_stats}


@partial(jax.jit, static_argnames=("model", "image_shape"))
def init_network(model: nn.Module, key: jax.Array, image_shape: tuple[int, ...]) -> tuple[dict[str, Any], ModelOutput]:
    """Fresh variables of a network for images [H, W, C], and its output for two black ones.

    Meant for use within jit or eval_shape: an output of which only the shapes are used then costs nothing. Jitted
    itself only so that a network is traced once, whoever asks.
    """
    images = jnp.zeros((2, *image_shape), model.dtype)
    output, variables = model.clone(axis_name=None).init_with_output(key, images, train=False)
    return variables, output


def init_state(
    key: jax.Array,
    student: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    teacher_output: ModelOutput | None = None,
    label: jax.ShapeDtypeStruct = _ONE_CATEGORY,
) -> TrainState:
    """Fresh state.

    Args:
      key: of the random draws.
      student: network to train.
      objective: the weighted methods.
      optimizer: over the parameters of the student and of the methods.
      image_shape: of one image, (H, W, C).
      teacher_output: its shapes, from `init_network`; needed where the objective reads a teacher.
      label: of one image: int32 [] or float32 [K].
    """
    student_key, methods_key = jax.random.split(key)
    variables, student_output = init_network(student, student_key, image_shape)
    inputs = LossInputs(
        student=student_output,
        teacher=teacher_output,
        labels=jax.ShapeDtypeStruct((2, *label.shape), label.dtype),
        indices=jax.ShapeDtypeStruct((2,), jnp.int32),
        key=jax.ShapeDtypeStruct(key.shape, key.dtype),
    )
    methods, memory = objective.init(methods_key, inputs)
    params = {"student": variables["params"], "methods": methods}
    return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params), memory)
