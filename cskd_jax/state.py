"""Everything that training changes, in one tree."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from cskd_jax.losses import LossInputs
from cskd_jax.objective import Objective, needs_teacher


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


def init_variables(model: nn.Module, key: jax.Array, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Fresh variables of a network for images [H, W, C]; nothing is computed but the draws."""
    images = jax.ShapeDtypeStruct((1, *image_shape), model.dtype)
    return model.clone(axis_name=None).lazy_init(key, images, train=False)


def init_state(
    key: jax.Array,
    student: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    teacher: nn.Module | None = None,
) -> TrainState:
    """Fresh state; `teacher` is needed (for its shapes alone) where the objective reads one."""
    student_key, methods_key = jax.random.split(key)
    variables = init_variables(student, student_key, image_shape)

    def output_shapes(model):
        def output(key):
            model_variables = init_variables(model, key, image_shape)
            images = jnp.zeros((2, *image_shape), model.dtype)
            return model.clone(axis_name=None).apply(model_variables, images, train=False)

        return jax.eval_shape(output, key)

    inputs = LossInputs(
        student=output_shapes(student),
        teacher=output_shapes(teacher) if needs_teacher(objective.methods) else None,
        labels=jax.ShapeDtypeStruct((2,), jnp.int32),
        indices=jax.ShapeDtypeStruct((2,), jnp.int32),
        key=jax.ShapeDtypeStruct(key.shape, key.dtype),
    )
    methods, memory = objective.init(methods_key, inputs)
    params = {"student": variables["params"], "methods": methods}
    return TrainState(jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params), memory)
