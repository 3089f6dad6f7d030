"""The layers of a network whose variables losses read: its classifier, and the normalizations that end its stages."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from cskd_jax.losses import Head, LossInputs, Norm
from cskd_jax.training.networks import Network, Variables

# Path of the classifier in the networks of this package, and in any other that gives its last layer the same name.
CLASSIFIER = "classifier"


class Layers(NamedTuple):
    """The layers of a network whose variables losses read.

    Attributes:
      head: Classifier; None if the network has no known classifier.
      norms: Batch normalizations before the last ReLU of each stage; None if the network does not report them.
    """

    head: Any = None
    norms: Any = None


NO_LAYERS = Layers()


def layers_of(network: Network, variables: Variables) -> Layers:
    """Returns the layers of a network that losses may read.

    The classifier is the linear layer at the path in the network's `head` attribute ("classifier" for a network without
    that attribute); the normalizations are those at the paths in its `norms` attribute.

    Args:
      network: Network.
      variables: Its variables, or their shapes.

    Raises:
      ValueError: There is no linear layer at the path of the classifier, or no normalization at one of `norms`.
    """
    params, path = variables.get("params", {}), getattr(network, "head", CLASSIFIER)
    head = None if path is None else _head_at(params, path)
    if head is None and path not in (None, CLASSIFIER):
        found = ", ".join(map(repr, _linear_layers(params)))
        raise ValueError(
            f"there is no linear layer, with a kernel [features, classes], at {path!r}; the network has "
            f"{f'them at {found}' if found else 'none'}"
        )
    norms = tuple(_norm_at(params, norm) for norm in getattr(network, "norms", ()))
    return Layers(head, norms or None)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Missing:
    """A placeholder for layers that a network does not have, or that are not known; reading it raises a clear error.

    Attributes:
      message: The error.
    """

    message: str

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        raise ValueError(self.message)

    def __call__(self, *_):
        raise ValueError(self.message)

    def __iter__(self):
        raise ValueError(self.message)


def _no_head(role):
    return _Missing(
        f"it reads the classifier of the {role}, which is unknown: name the path of the linear layer with which "
        f"that network predicts, such as {role}_head='Dense_0' in distill, or LinenNetwork(module, head='Dense_0')"
    )


_NOT_OF_SEVERAL = _Missing(
    "it reads the classifier or a normalization of the teacher, which works only with a single teacher: use one "
    "teacher, and leave the loss's teacher setting at None"
)

_OF_OTHER_CLASSES = _Missing("it reads the classifier of the teacher, which has other classes than the data")

_NO_NORMS = _Missing(
    "it reads the batch normalizations before the last ReLU of each stage of the teacher, which that network does "
    "not report: ResNets, wide ResNets, VGGs and MobileNets of this package do, and so does any linen module "
    "with an attribute `preactivation_norms`, a tuple of their paths"
)


def guard_layers(inputs: LossInputs) -> LossInputs:
    """Returns loss inputs in which reading a missing layer raises a clear error."""
    if inputs.teacher is not None and inputs.teacher.members:
        inputs = without_teacher_layers(inputs)
    elif inputs.teacher is not None and inputs.teacher.logits is None and inputs.teacher_head is None:
        inputs = inputs._replace(teacher_head=_OF_OTHER_CLASSES)
    heads = {f"{role}_head": getattr(inputs, f"{role}_head") for role in ("student", "teacher")}
    heads = {name: _no_head(name.partition("_")[0]) if head is None else head for name, head in heads.items()}
    return inputs._replace(
        teacher_norms=_NO_NORMS if inputs.teacher_norms is None else inputs.teacher_norms,
        **heads,
    )


def without_teacher_layers(inputs: LossInputs) -> LossInputs:
    """Returns loss inputs in which reading a layer of the teacher raises a clear error."""
    return inputs._replace(teacher_head=_NOT_OF_SEVERAL, teacher_norms=_NOT_OF_SEVERAL)


def _at(params, path):
    for name in path.split("/"):
        params = params.get(name) if isinstance(params, Mapping) else None
    return params


def _head_at(params, path):
    """Returns the linear layer at a path, or None."""
    layer: Any = _at(params, path)
    kernel = layer.get("kernel") if isinstance(layer, Mapping) else None
    if kernel is None or len(kernel.shape) != 2:
        return None
    # NumPy zeros do not become part of a program that does not read them.
    none: Any = np.zeros(kernel.shape[1], kernel.dtype)
    return Head(kernel, layer.get("bias", none))


def _norm_at(params, path):
    layer = _at(params, path)
    if not isinstance(layer, Mapping) or not {"scale", "bias"} <= layer.keys():
        raise ValueError(f"there is no batch normalization, with scale and bias, at {path!r}")
    return Norm(layer["scale"], layer["bias"])


def _linear_layers(params, prefix=""):
    """Returns the paths of all linear layers."""
    found = []
    for name, part in params.items() if isinstance(params, Mapping) else ():
        path = f"{prefix}{name}"
        found += [path] if _head_at(params, name) is not None else _linear_layers(part, f"{path}/")
    return found
