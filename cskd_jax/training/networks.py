"""The interface between networks and the trainer. `adapters.as_network` turns a module into a `Network`."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.extend.core
import numpy as np

from cskd_jax.errors import UserError
from cskd_jax.models import ModelOutput

Variables = Mapping[str, Any]


@runtime_checkable
class Network(Protocol):
    """The interface that the trainer requires of a network."""

    @property
    def synchronized(self) -> bool:
        """Returns whether the network itself computes batch statistics from the global batch.

        If not, the trainer averages its updated collections over the devices, and results depend on the number of
        devices.
        """
        ...

    @property
    def variables(self) -> Variables | None:
        """Returns the variables that come with the network; None if `init` makes fresh ones."""
        ...

    def init(self, key: jax.Array, image_shape: tuple[int, ...]) -> tuple[Variables, ModelOutput]:
        """Returns fresh variables, and the outputs for two black images of shape [H, W, C]."""
        ...

    def apply(
        self, variables: Variables, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[ModelOutput, Variables]:
        """Returns the outputs for images [B, H, W, C], and the updated collections (empty outside of training)."""
        ...

    def on_axis(self, axis_name: str | None) -> "Network":
        """Returns the network for a batch that is split over a mapped axis; None means a whole batch."""
        ...


def as_output(outputs: Any) -> ModelOutput:
    """Returns the result of a module as a `ModelOutput` whose logits are at least float32.

    Args:
      outputs: A `ModelOutput`, a dictionary with some of its fields, including "logits", or logits [B, C].

    Raises:
      ValueError: The result is none of these.
    """
    if isinstance(outputs, Mapping):
        unknown = sorted(outputs.keys() - set(ModelOutput._fields))
        if unknown or "logits" not in outputs:
            raise ValueError(
                f"the network returns a dictionary with {', '.join(map(repr, outputs))}; "
                f"it must hold 'logits', and may hold {', '.join(ModelOutput._fields[1:])}"
            )
        outputs = ModelOutput(**outputs)
    elif isinstance(outputs, jax.Array):
        outputs = ModelOutput(outputs)
    if not isinstance(outputs, ModelOutput):
        kind = type(outputs).__name__
        raise ValueError(f"the network returns a {kind}; it must return logits, a dictionary or a ModelOutput")
    for name in ("features", "preactivations"):
        if not isinstance(getattr(outputs, name), tuple | list):
            raise ValueError(f"the network returns {name} as {type(getattr(outputs, name)).__name__}, not as a tuple")
    dtype = np.promote_types(outputs.logits.dtype, np.float32)
    return outputs._replace(
        logits=outputs.logits.astype(dtype),
        features=tuple(outputs.features),
        preactivations=tuple(outputs.preactivations),
    )


def check_collections(name: str, variables: Variables) -> None:
    """Raises UserError for variables, called `name` in the message, that are not collections with "params"."""
    if not isinstance(variables, Mapping) or (variables and "params" not in variables):
        found = (
            f"the keys {', '.join(map(str, variables))}" if isinstance(variables, Mapping) else type(variables).__name__
        )
        raise UserError(
            f"{name} must be {{'params': ...}}, with the other collections of the network, such as 'batch_stats', "
            f"beside 'params'; got {found}"
        )


def make_rngs(key: jax.Array | None, streams: tuple[str, ...]) -> dict[str, jax.Array] | None:
    """Returns the keys of the random streams of a network: "params", from which any other draws, and `streams`."""
    if key is None:
        return None
    return {"params": key} | {name: jax.random.fold_in(key, number) for number, name in enumerate(streams)}


def draws_random_numbers(network: Network, variables: Variables, images: jax.ShapeDtypeStruct) -> bool:
    """Returns whether the outputs in training mode depend on the key, as with dropout."""
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    traced = jax.make_jaxpr(lambda k, v, x: network.apply(v, x, train=True, key=k)[0])(key, variables, images).jaxpr
    return any(_depend(traced, [x is traced.invars[0] for x in traced.invars]))


def _depend(program: jax.extend.core.Jaxpr, inputs: Sequence[bool]) -> list[bool]:
    """Returns which outputs of a traced program depend on the inputs marked True."""
    reached = {x for x, is_reached in zip(program.invars, inputs, strict=True) if is_reached}

    def are_reached(values):
        return [isinstance(x, jax.extend.core.Var) and x in reached for x in values]

    for equation in program.eqns:
        found = are_reached(equation.invars)
        inner = equation.params.get("jaxpr")  # A jitted block is given the key whether it draws or not.
        if any(found) and isinstance(inner, jax.extend.core.ClosedJaxpr) and len(inner.jaxpr.invars) == len(found):
            outputs = _depend(inner.jaxpr, found)
        else:
            outputs = [any(found)] * len(equation.outvars)
        reached.update(x for x, is_reached in zip(equation.outvars, outputs, strict=True) if is_reached)
    return are_reached(program.outvars)
