"""Networks as the trainer sees them, and the adapter for linen modules.

A network is anything with the two methods of `Network`. `as_network` makes one of a linen module, whoever wrote it:

- The collections of its variables besides "params", such as "batch_stats", are kept and updated, whatever their names.
- Its random streams get keys in training mode: those named in `streams`, and any other from that of "params".
- The argument that switches training mode on is found by its name; a module without one is called the same way always.
- What it sows for others to read is not kept from step to step.
- It returns a `ModelOutput`, a dictionary with the same keys, or logits alone. Feature maps that it does not return are
  taken from within it by the paths of its submodules.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from cskd_jax.models import ModelOutput

Variables = Mapping[str, Any]

# The names of the argument of `__call__` that asks for training mode, and the value that does.
_TRAINING_FLAGS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
_INTERMEDIATES = "intermediates"


@runtime_checkable
class Network(Protocol):
    """What the trainer needs of a network."""

    @property
    def synchronized(self) -> bool:
        """Returns whether the network itself computes the statistics of a batch from the global batch.

        If not, the trainer averages its updated collections over the devices, and results depend on their number.
        """
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
        """Returns the network for use where the batch is split over a mapped axis; None where it is whole."""
        ...


@dataclasses.dataclass(frozen=True)
class LinenNetwork:
    """A linen module as a `Network`. The module is called directly, never wrapped in another: its weights are its own.

    Attributes:
      module: The module, called with images [B, H, W, C].
      features: Paths of the submodules whose outputs are the features, first stage first, such as "Conv_1" or
        "encoder/block_3". Empty where the module returns them itself, or where no loss reads them.
      embedding: The path of the submodule whose output is the embedding; None as above.
      streams: Names of the random streams that get a key of their own. A module that draws from another with
        `make_rng` draws from "params" instead; one that asks `has_rng`, or splits a stream, needs its name here.
    """

    module: nn.Module
    features: tuple[str, ...] = ()
    embedding: str | None = None
    streams: tuple[str, ...] = ("dropout",)

    @property
    def synchronized(self) -> bool:
        """Whether the module takes the name of the axis over which a batch is split."""
        return "axis_name" in _field_names(self.module)

    def on_axis(self, axis_name: str | None) -> "LinenNetwork":
        """See `Network.on_axis`."""
        if not self.synchronized:
            return self
        return dataclasses.replace(self, module=self.module.clone(axis_name=axis_name))

    def init(self, key: jax.Array, image_shape: tuple[int, ...]) -> tuple[Variables, ModelOutput]:
        """See `Network.init`."""
        dtype = getattr(self.module, "dtype", None) or jnp.float32
        images = jnp.zeros((2, *image_shape), dtype)
        alone = self.on_axis(None)
        args, flags = self._flags(train=False)
        outputs, variables = alone.module.init_with_output(key, images, *args, **flags)
        variables = {name: collection for name, collection in variables.items() if not _is_sown(collection)}
        if not self._paths:
            return variables, as_output(outputs)
        return variables, alone.apply(variables, images, train=False)[0]

    def apply(
        self, variables: Variables, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[ModelOutput, Variables]:
        """See `Network.apply`."""
        mutable = [name for name in variables if name != "params"] if train else []
        rngs = None
        if train and key is not None:
            keys = {name: jax.random.fold_in(key, number) for number, name in enumerate(self.streams)}
            rngs = {"params": key, **keys}
        args, flags = self._flags(train=train)
        if not (mutable or self._paths):
            return as_output(self.module.apply(variables, images, *args, rngs=rngs, **flags)), {}
        if self._paths:
            # Everything is captured and the paths are selected afterwards: within a jitted submodule a filter is not
            # asked. What is not selected costs nothing in a compiled program.
            mutable = [*mutable, _INTERMEDIATES]
            flags |= {"capture_intermediates": True}
        outputs, updated = self.module.apply(variables, images, *args, rngs=rngs, mutable=mutable, **flags)
        updated = dict(updated)
        return self._select(as_output(outputs), updated.pop(_INTERMEDIATES, {})), updated

    @property
    def _paths(self) -> tuple[str, ...]:
        return (*self.features, *([] if self.embedding is None else [self.embedding]))

    @property
    def has_training_mode(self) -> bool:
        """Whether the module can be told that it is trained."""
        return any(self._flags(train=True))

    def _flags(self, *, train: bool) -> tuple[tuple[bool, ...], dict[str, Any]]:
        """Returns what asks for training mode: positional arguments behind the images, and keywords."""
        parameters = list(inspect.signature(type(self.module).__call__).parameters.values())
        # An attribute of the module that has a value may not be given once more.
        asked = {
            name: value == train
            for name, value in _TRAINING_FLAGS.items()
            if name in [parameter.name for parameter in parameters] and getattr(self.module, name, None) is None
        }
        # By position where that is allowed: `nn.jit` and `nn.remat` know their static arguments by it.
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if len(parameters) > 2 and parameters[2].name in asked and parameters[2].kind in by_position:
            return (asked.pop(parameters[2].name),), asked
        return (), asked

    def _select(self, output: ModelOutput, intermediates: Any) -> ModelOutput:
        if not self._paths:
            return output
        found = _by_path(intermediates)
        for path in self._paths:
            if path not in found:
                near = difflib.get_close_matches(path, found, n=5, cutoff=0.3) or sorted(found)[:5]
                raise ValueError(
                    f"{type(self.module).__name__} has no output at path {path!r}; the nearest are {', '.join(near)}"
                )
        if self.features:
            output = output._replace(features=tuple(found[path] for path in self.features))
        if self.embedding is not None:
            output = output._replace(embedding=found[self.embedding])
        return output

    def __hash__(self):
        try:
            return hash((self.module, self.features, self.embedding))
        except TypeError:  # A module may have fields that cannot be hashed.
            return id(self.module)


def as_network(module: Any, features: Sequence[str] = (), embedding: str | None = None) -> Network:
    """Returns the network that a module is.

    Args:
      module: A linen module, or a `Network`.
      features: Paths of the features, as in `LinenNetwork`.
      embedding: Path of the embedding, likewise.

    Raises:
      TypeError: It is neither, or paths are given for a network that is not a linen module.
    """
    if isinstance(module, nn.Module):
        return LinenNetwork(module, tuple(features), embedding)
    if isinstance(module, LinenNetwork) and (features or embedding):
        return dataclasses.replace(module, features=tuple(features), embedding=embedding)
    if isinstance(module, Network) and not isinstance(module, type) and not (features or embedding):
        return module
    kind = module.__name__ if isinstance(module, type) else type(module).__name__
    raise TypeError(f"a network must be an instance of a flax.linen.Module or a Network; got {kind}")


def as_output(outputs: Any) -> ModelOutput:
    """Returns what a module has returned as a `ModelOutput` whose logits are at least float32.

    Args:
      outputs: A `ModelOutput`, a dictionary with some of its fields, "logits" among them, or logits [B, C].

    Raises:
      ValueError: It is none of these.
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


def draws_random_numbers(network: Network, variables: Variables, images: jax.ShapeDtypeStruct) -> bool:
    """Returns whether the network asks for random numbers in training mode, as one with dropout does."""
    try:
        jax.eval_shape(lambda v, x: network.apply(v, x, train=True)[0], variables, images)
    except Exception as error:
        # Flax has a class for it; other networks raise what they like, and show it again where it is reported.
        return "rng" in type(error).__name__.lower() or "rng" in str(error).lower()
    return False


def _by_path(intermediates: Any) -> dict[str, Any]:
    """Returns {path: output} of captured intermediates; of a submodule called several times, the last output."""
    flat = traverse_util.flatten_dict(dict(intermediates), sep="/")
    found = {}
    for path, values in flat.items():
        value = values[-1] if isinstance(values, tuple) and values else values
        if isinstance(value, jax.Array):
            found[path.removesuffix("/__call__").removesuffix("__call__")] = value
    found.pop("", None)
    return found


def _is_sown(collection: Any) -> bool:
    """Returns whether a collection holds what was sown, which comes in tuples that grow at every call."""
    leaves = jax.tree.leaves(collection, is_leaf=lambda x: isinstance(x, tuple))
    return any(isinstance(leaf, tuple) for leaf in leaves)


def _field_names(module: nn.Module) -> set[str]:
    return {field.name for field in dataclasses.fields(module)}
