"""The training state: everything that training changes, in one tree."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct, traverse_util

from cskd_jax.errors import UserError
from cskd_jax.losses import LossInputs, View
from cskd_jax.models import ModelOutput
from cskd_jax.training.layers import NO_LAYERS, Layers, layers_of
from cskd_jax.training.networks import Network, Variables
from cskd_jax.training.objective import Objective
from cskd_jax.training.peers import without_peers

_ONE_CLASS = jax.ShapeDtypeStruct((), jnp.int32)


@struct.dataclass
class TrainState:
    """The training state of a student.

    Attributes:
      step: int32, the number of optimization steps done.
      params: {"network": parameters of the network, "losses": {name: parameters of the loss}}.
      collections: {name: the network's variables of this collection}, such as "batch_stats"; all but the parameters.
      opt_state: State of the optimizer over all of `params`.
      memory: {name: state of the loss that is kept from step to step but not trained}; empty for most losses.
      ema: Exponential moving average of the network's variables, {"params": ..., and its other collections}, without
        those of peers; empty if none is kept.
    """

    step: jax.Array
    params: Any
    collections: Any
    opt_state: Any
    memory: Any = struct.field(default_factory=dict)
    ema: Any = struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """Returns the variables of the network after the last update."""
        return {"params": self.params["network"], **self.collections}

    @property
    def averaged(self) -> dict[str, Any]:
        """Returns the variables of the network for inference: their moving average if one is kept."""
        return self.ema or self.variables


@partial(jax.jit, static_argnames=("network", "image_shape"))
def init_network(network: Network, key: jax.Array, image_shape: tuple[int, ...]) -> tuple[Variables, ModelOutput]:
    """Returns `network.init(key, image_shape)`.

    This function is meant for use within jit or eval_shape, where an output costs nothing if only its shapes are used.
    It is itself jitted only so that a network is traced once for all callers.
    """
    return network.init(key, image_shape)


def check_variables(network: Network, variables: Variables, image_shape: tuple[int, ...], source: str) -> None:
    """Raises UserError unless variables from outside have the names and shapes that a network expects.

    Args:
      network: Network that is to use them.
      variables: Variables.
      image_shape: Shape of one image, (H, W, C).
      source: Name of their source, for the message.
    """
    key = jax.random.PRNGKey(0)
    try:
        expected = jax.eval_shape(partial(init_network, network, image_shape=image_shape), key)[0]
    except ValueError as error:  # For example, images that do not divide into the patches of the network.
        raise UserError(f"{source} does not work with images of shape {tuple(image_shape)}: {error}") from None
    trees: list[dict[str, Any]] = [traverse_util.flatten_dict(tree, sep="/") for tree in (variables, expected)]
    shapes = [{name: tuple(leaf.shape) for name, leaf in tree.items()} for tree in trees]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        found, wanted = (shape.get(name, "nothing") for shape in shapes)
        if found != wanted:
            raise UserError(f"{source} does not hold this network: {name} is {found} instead of {wanted}")


def init_state(
    key: jax.Array,
    student: Network,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    teacher_output: ModelOutput | None = None,
    label: jax.ShapeDtypeStruct = _ONE_CLASS,
    variables: Variables | None = None,
    ema: bool = False,
    teacher_layers: Layers = NO_LAYERS,
) -> TrainState:
    """Returns a fresh state.

    Args:
      key: Key of the random draws.
      student: Network to train.
      objective: Weighted losses.
      optimizer: Optimizer of the parameters of the student and of the losses.
      image_shape: Shape of one image, (H, W, C).
      teacher_output: Shapes of the teacher's outputs; needed if the objective reads a teacher.
      label: Shape and dtype of the label of one image: int32 [] or float32 [K].
      variables: Variables to start from; None for fresh ones.
      ema: Whether a moving average of the variables is kept, which starts from the initial ones.
      teacher_layers: Shapes of the layers of the teacher that losses may read.
    """
    student_key, losses_key = jax.random.split(key)
    if variables is None:
        start, student_output = init_network(student, student_key, image_shape)
    else:
        start, student_output = variables, jax.eval_shape(partial(output_of, student, image_shape), variables)
    head = layers_of(student, start).head
    inputs = example_inputs(
        student_output, teacher_output, label, key, objective.views, student_head=head, layers=teacher_layers
    )
    losses, memory = objective.init(losses_key, inputs)
    params = {"network": start.get("params", {}), "losses": losses}
    opt_state = init_optimizer(optimizer, params)
    state = TrainState(jnp.zeros((), jnp.int32), params, collections_of(start), opt_state, memory)
    return dataclasses.replace(state, ema=without_peers(state.variables)) if ema else state


def example_inputs(
    student: ModelOutput,
    teacher: ModelOutput | None,
    label: jax.ShapeDtypeStruct,
    key: jax.Array,
    views: int = 0,
    *,
    student_head: Any = None,
    layers: Layers = NO_LAYERS,
) -> LossInputs:
    """Returns the inputs of losses for two images, as shapes.

    Args:
      student: Outputs of the student, or their shapes.
      teacher: Outputs of the teacher, or their shapes; None without one.
      label: Shape and dtype of the label of one image.
      key: A key.
      views: Number of further views of the images.
      student_head: Classifier of the student, or its shapes; None if it is not known.
      layers: Layers of the teacher that losses may read, or their shapes.
    """
    shape: Any = jax.ShapeDtypeStruct  # Shapes stand in for arrays.
    return LossInputs(
        student=student,
        teacher=teacher,
        labels=shape((2, *label.shape), label.dtype),
        indices=shape((2,), jnp.int32),
        key=shape(key.shape, key.dtype),
        student_head=student_head,
        teacher_head=layers.head,
        teacher_norms=layers.norms,
        epoch=shape((), jnp.int32),
        views=(View(student, teacher, student),) * views,
        average=student,
    )


def output_of(network: Network, image_shape: tuple[int, ...], variables: Variables) -> ModelOutput:
    """Returns the outputs of a network in evaluation mode for two black images."""
    return network.on_axis(None).apply(variables, jnp.zeros((2, *image_shape), jnp.float32), train=False)[0]


def collections_of(variables: Variables) -> Mapping[str, Any]:
    """Returns the variables of a network without its parameters."""
    return {name: collection for name, collection in variables.items() if name != "params"}


def init_optimizer(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """Returns `optimizer.init(params)`, allowing for parts of optax that fail under strict dtype promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return optimizer.init(params)


def check_unchanged(before: TrainState, after: TrainState) -> None:
    """Raises ValueError if a step changes the shapes or dtypes of the state; nothing else is read."""
    shapes = []
    for state in (before, after):
        leaves = jax.tree_util.tree_leaves_with_path(state)
        shapes.append({jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves})
    for path in sorted(shapes[0].keys() | shapes[1].keys()):
        old, new = (found.get(path, "nothing") for found in shapes)
        if old != new:
            raise ValueError(f"a step changes {path} from {old} to {new}; it must keep its shape and dtype")
