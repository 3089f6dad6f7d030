"""Adapters that turn linen modules, functions and (in `nnx_adapter`) nnx modules into networks for the trainer.

Any module of flax.linen:

- Its variable collections other than "params", such as "batch_stats", are kept and updated, whatever their names.
- Its random streams get keys in training mode: those named in `streams` have their own, any other draws from "params".
- The argument that switches training mode on is found by its name; a module without one is always called the same way.
- Sown values are not kept from step to step.
- It returns a `ModelOutput`, a dictionary with the same keys, or logits alone. Feature maps that it does not return are
  captured from its submodules, which are named by their paths.

A function `(variables, images, train, rngs) -> (outputs, updates)`:

- `variables` is {"params": ..., and other collections}. Training starts from the variables given with the function.
- `train` is True or False; `rngs` is {"params": key, "dropout": key} in training, otherwise None.
- `updates` holds the new values of the other collections that the function changes, such as {"batch_stats": ...}; it is
  only read in training.
"""

import dataclasses
import difflib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from cskd_jax.errors import UserError
from cskd_jax.models import ModelOutput
from cskd_jax.training.layers import CLASSIFIER
from cskd_jax.training.networks import Network, Variables, as_output, make_rngs

# Possible names of the `__call__` argument that selects training mode, and the value that turns it on.
_TRAINING_FLAGS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
_INTERMEDIATES = "intermediates"


@dataclasses.dataclass(frozen=True)
class LinenNetwork:
    """A linen module as a `Network`. The module is called directly, so the names of its variables do not change.

    Attributes:
      module: The module, called with images [B, H, W, C].
      features: Paths of the submodules whose outputs are the features, first stage first, such as "Conv_1" or
        "encoder/block_3". Empty if the module returns them itself, or if no loss reads them.
      embedding: Path of the submodule whose output is the embedding; None if it is not needed.
      streams: Names of the random streams that get their own key. A module that draws from any other stream with
        `make_rng` draws from "params" instead; a stream that the module checks with `has_rng`, or splits, must be named
        here.
      trainable: Function from the path of a parameter to whether it is trained. Submodules whose parameters are all
        frozen run in evaluation mode if they get their training flag by keyword. None leaves all submodules in training
        mode.
      head: Path of the classifier, a linear layer on the pooled last map, for losses that read it.
    """

    module: nn.Module
    features: tuple[str, ...] = ()
    embedding: str | None = None
    streams: tuple[str, ...] = ("dropout",)
    trainable: Callable[[tuple[str, ...]], bool] | None = None
    head: str = CLASSIFIER

    @property
    def variables(self) -> None:
        """Returns None: `init` makes fresh variables."""
        return None

    @property
    def synchronized(self) -> bool:
        """Returns whether the module accepts the name of the axis over which a batch is split."""
        return "axis_name" in _field_names(self.module)

    @property
    def draws_by_position(self) -> bool:
        """Returns whether the module draws random numbers by the positions of samples in the global batch."""
        return getattr(self.module, "draws_by_position", False)

    @property
    def norms(self) -> tuple[str, ...]:
        """Returns the paths of the batch normalizations before the last ReLU of each stage; empty if not known."""
        return getattr(self.module, "preactivation_norms", ())

    def on_axis(self, axis_name: str | None) -> "LinenNetwork":
        """Returns the network for a batch that is split over a mapped axis; None means a whole batch."""
        if not self.synchronized:
            return self
        return dataclasses.replace(self, module=self.module.clone(axis_name=axis_name))

    def init(self, key: jax.Array, image_shape: tuple[int, ...]) -> tuple[Variables, ModelOutput]:
        """Returns fresh variables, and the outputs for two black images of shape [H, W, C]."""
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
        """Returns the outputs for images [B, H, W, C], and the updated collections (empty outside of training)."""
        if train and self.trainable is not None:
            frozen = _frozen_modules(variables["params"], self.trainable)
            if () not in frozen:
                with nn.intercept_methods(_evaluating(frozen)):
                    return dataclasses.replace(self, trainable=None).apply(variables, images, train=True, key=key)
            train = False
        mutable = [name for name in variables if name != "params"] if train else []
        rngs = make_rngs(key, self.streams) if train else None
        args, flags = self._flags(train=train)
        if not (mutable or self._paths):
            return as_output(self.module.apply(variables, images, *args, rngs=rngs, **flags)), {}
        if self._paths:
            # Everything is captured and the paths are selected afterwards, because a filter is not called inside a
            # jitted submodule. Outputs that are not selected cost nothing in a compiled program.
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
        """Returns whether the module has a training mode."""
        return any(self._flags(train=True))

    def _flags(self, *, train: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments that select training mode: positional ones after the images, and keyword arguments."""
        parameters = list(inspect.signature(type(self.module).__call__).parameters.values())
        # A flag that is already set as an attribute of the module must not be passed again.
        asked = {
            name: value == train
            for name, value in _TRAINING_FLAGS.items()
            if name in [parameter.name for parameter in parameters] and getattr(self.module, name, None) is None
        }
        # Pass it by position where possible: `nn.jit` and `nn.remat` identify their static arguments by position.
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


@dataclasses.dataclass(frozen=True)
class FunctionNetwork:
    """A pure function `(variables, images, train, rngs) -> (outputs, updates)` as a `Network`.

    Attributes:
      function: The function.
      variables: Variables that training starts from; None if they are given separately, as `student_variables`.
      head: Path, within the parameters, of the classifier, a linear layer on the pooled last map, for losses that read
        it.
    """

    function: Callable[..., Any]
    variables: Variables | None = None
    head: str = CLASSIFIER

    synchronized = False

    def on_axis(self, axis_name: str | None) -> "FunctionNetwork":
        """Returns the network itself, which knows nothing about axes."""
        del axis_name
        return self

    def init(self, key: jax.Array, image_shape: tuple[int, ...]) -> tuple[Variables, ModelOutput]:
        """Raises ValueError, because a function does not create variables."""
        raise ValueError("a function creates no variables of its own: give it student_variables to start from")

    def apply(
        self, variables: Variables, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> tuple[ModelOutput, Variables]:
        """Returns the outputs for images [B, H, W, C], and the updated collections (empty outside of training)."""
        returned = self.function(variables, images, train, make_rngs(key, ("dropout",)) if train else None)
        if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], Mapping):
            raise ValueError(
                "a function used as a network must return (outputs, updates), with the updates as a (possibly empty) "
                "dictionary"
            )
        outputs, updates = returned
        unknown = sorted(updates.keys() - variables.keys() | updates.keys() & {"params"})
        if train and unknown:
            raise ValueError(
                f"the function returns updates of {', '.join(unknown)}; it may update only the collections of its "
                "variables other than params"
            )
        return as_output(outputs), updates if train else {}

    def __hash__(self):
        return hash(self.function)


def as_network(
    module: Any, features: Sequence[str] = (), embedding: str | None = None, head: str | None = None
) -> Network:
    """Returns a module as a `Network`.

    Args:
      module: A linen module, an nnx module, a function, or a `Network`; see the docstring of this module.
      features: Paths of the features of a linen module, as in `LinenNetwork`.
      embedding: Path of the embedding of a linen module, as in `LinenNetwork`.
      head: Path of the classifier within the parameters, for losses that read it; None means "classifier" or, for a
        `Network`, its own path.

    Raises:
      TypeError: The module is none of these, or paths are given for a network that is not a linen module.
      UserError: A linen module is bound to variables.
    """
    heads: dict[str, Any] = {} if head is None else {"head": head}
    if isinstance(module, nn.Module) and module.scope is not None:
        raise UserError(
            f"the {type(module).__name__} is bound to variables, with which training would not start: give "
            "module.unbind()[0], and the variables as student_variables or teacher_variables"
        )
    if isinstance(module, nn.Module):
        return LinenNetwork(module, tuple(features), embedding, **heads)
    if isinstance(module, LinenNetwork):
        changes = {"features": tuple(features), "embedding": embedding} if features or embedding else {}
        return dataclasses.replace(module, **changes, **heads)
    kind = module.__name__ if isinstance(module, type) else type(module).__name__
    if isinstance(module, type):
        raise TypeError(f"a network must be an instance; got the class {kind}")
    if features or embedding:
        raise TypeError(
            f"features and an embedding can be named by path only in a flax.linen.Module; got {kind}: instead, have it "
            "return a dictionary {'logits': ..., 'features': (...), 'embedding': ...}"
        )
    # Importing nnx takes a while, and a caller with an nnx module has already imported it.
    if "flax.nnx" in sys.modules and isinstance(module, sys.modules["flax.nnx"].Module):
        from cskd_jax.training.nnx_adapter import NnxNetwork

        return NnxNetwork(module, **heads)
    if isinstance(module, FunctionNetwork):
        return dataclasses.replace(module, **heads)
    if isinstance(module, Network):
        if heads:
            raise TypeError(f"a {kind} names its own classifier, with an attribute `head`")
        return module
    if callable(module):
        return FunctionNetwork(module, **heads)
    raise TypeError(f"a network must be a flax.linen.Module, a flax.nnx.Module, a function or a Network; got {kind}")


def _frozen_modules(params: Any, trainable: Callable[[tuple[str, ...]], bool]) -> set[tuple[str, ...]]:
    """Returns the paths of the modules that have parameters, none of which is trained; () is the network itself."""
    paths = traverse_util.flatten_dict(dict(params))
    modules, trained = (
        {path[:length] for path in chosen for length in range(len(path))}
        for chosen in (paths, [path for path in paths if trainable(path)])
    )
    return modules - trained


def _evaluating(frozen: set[tuple[str, ...]]) -> Callable[..., Any]:
    """Returns a flax.linen method interceptor that calls the modules at the given paths in evaluation mode."""

    def intercept(call, args, kwargs, context):
        if context.module.path in frozen:
            kwargs = kwargs | {name: not value for name, value in _TRAINING_FLAGS.items() if name in kwargs}
        return call(*args, **kwargs)

    return intercept


def _by_path(intermediates: Any) -> dict[str, Any]:
    """Returns {path: output} for captured intermediates; for a submodule called repeatedly, its last output."""
    flat = traverse_util.flatten_dict(dict(intermediates), sep="/")
    found = {}
    for path, values in flat.items():
        value = values[-1] if isinstance(values, tuple) and values else values
        if isinstance(value, jax.Array):
            found[path.removesuffix("/__call__").removesuffix("__call__")] = value
    found.pop("", None)
    return found


def _is_sown(collection: Any) -> bool:
    """Returns whether a collection holds sown values, which are tuples that grow at every call."""
    leaves = jax.tree.leaves(collection, is_leaf=lambda x: isinstance(x, tuple))
    return any(isinstance(leaf, tuple) for leaf in leaves)


def _field_names(module: nn.Module) -> set[str]:
    return {field.name for field in dataclasses.fields(module)}
