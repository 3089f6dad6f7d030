"""Finds the known network nearest to the tensors of a file, for the error message of a failed import."""

import collections
import difflib
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cskd_jax.errors import UserError
from cskd_jax.interop.names import aliases, expected_shapes, mismatches
from cskd_jax.interop.renames import rename
from cskd_jax.interop.settings import read_settings
from cskd_jax.models import MODELS, Bottleneck, ResNet, create_model

_Shapes = Mapping[str, tuple[int, ...]]
# Numbers of classes and channels that no layer has, so that an axis of this size stands for any size.
_ANY_CLASSES, _ANY_CHANNELS = 9973, 9967
# Share of the tensors that must fit a network for it to count as near.
_NEAR = 0.5
# Number of names for which a message shows the likely counterpart, and number of names that are compared to find it.
_SHOWN_NAMES, _COMPARED_NAMES = 3, 100
# Widths that an import accepts.
_WIDTHS = (1e-3, 64)


class _Network(NamedTuple):
    """A network in the table, with a width and the settings read from a file, and how much of the file matches it."""

    name: str
    width: float
    settings: dict[str, Any]
    share: float
    classes: int | None
    channels: int | None

    @property
    def flags(self) -> str:
        flags = {"model": self.name, "width": None if self.width == 1 else f"{self.width:g}"}
        # A network has no head, or one for at least two classes.
        flags |= {"num_classes": None if self.classes in (None, 0, 1) else self.classes}
        flags |= {"channels": None if self.channels == 3 else self.channels}
        return " ".join(f"--{flag}={value}" for flag, value in flags.items() if value is not None)


def describe_nearest(tensors: Mapping[str, np.ndarray], width: float = 1.0) -> str:
    """Returns a phrase that names the known network nearest to the tensors.

    Args:
      tensors: Tensors by name.
      width: Width that the network is supposed to have.
    """
    floats = {name: array for name, array in tensors.items() if jnp.issubdtype(array.dtype, np.floating)}
    shapes = {name: array.shape for name, array in floats.items()}
    names = _plausible(shapes)
    rated = [network for name in names for network in _rate(name, shapes)]
    best = max(network.share for network in rated)
    near = [network for network in rated if network.share == best]
    if exact := [network for network in near if _fits(network, floats)]:
        # The sizes of Vision Transformers differ only in their width, apart from the heads, which cannot be read from a
        # file.
        exact = [network for network in exact if network.width == 1] or exact
        return f"the tensors are those of {' or '.join(network.flags for network in exact)}"
    if best >= _NEAR:
        return f"the nearest known network is {' or '.join(n.flags for n in near)}: {best:.0%} of the tensors match it"
    count = collections.Counter(shapes.values())
    if alike := [name for name in names if _alike(name, width, count)]:
        return f"the shapes are those of {' or '.join(alike)} under other names; --names=FILE can rename them"
    return "no known network is close"


def likely_names(missing: _Shapes, unknown: _Shapes) -> list[str]:
    """Returns phrases that name the likely counterparts of unknown names: missing ones of the same shape."""
    left, found = dict(missing), []
    kernels_first = sorted(unknown.items(), key=lambda item: -len(item[1]))
    for name, shape in kernels_first[:_COMPARED_NAMES]:
        close = difflib.get_close_matches(name, [other for other in left if left[other] == shape], n=1)
        if close:
            found.append(f"{name} may be {close[0]}")
            del left[close[0]]
        if len(found) == _SHOWN_NAMES:
            break
    return found


def _plausible(shapes: _Shapes) -> list[str]:
    """Returns the networks that may be near to tensors: all but ResNets of another depth, since tracing takes time."""
    kernels, distances = sum(len(shape) == 4 for shape in shapes.values()), {}
    for name in MODELS:
        module: Any = create_model(name, num_classes=2)
        if isinstance(module, ResNet):
            least = 1 + sum(module.stage_sizes) * (3 if module.block is Bottleneck else 2)
            most = least + len(module.stage_sizes)  # Every stage may have a kernel in its shortcut.
            distances[name] = max(0, least - kernels, kernels - most)
    closest = min(distances.values(), default=0)
    return [name for name in MODELS if distances.get(name, closest) == closest]


@functools.cache
def _known(name: str, width: float, settings: tuple[tuple[str, Any], ...] = ()) -> _Shapes:
    """Returns the shapes of a network in the table, where axes of certain sizes stand for any size."""
    module = create_model(name, num_classes=_ANY_CLASSES, width=width, settings=dict(settings))
    return expected_shapes(module, _ANY_CHANNELS)


def _rate(name: str, shapes: _Shapes) -> list[_Network]:
    """Returns a network at width 1 and, if most names fit, at the width that the stem in the file has."""
    found = _by_names_of(name, shapes)
    settings = read_settings(create_model(name, num_classes=2), found)
    told = tuple(settings.items())
    known = _known(name, 1.0, told)
    widths = {1.0}
    if 2 * len(known.keys() & found.keys()) > len(known):
        stem = next(tensor for tensor, shape in known.items() if _ANY_CHANNELS in shape)
        width = found[stem][0] / known[stem][0] if found.get(stem) else 1.0
        widths |= {width} if _WIDTHS[0] <= width <= _WIDTHS[1] else set()
    rated = []
    for width in sorted(widths):
        try:
            known = _known(name, width, told)
        except ValueError:  # A layer would have no channels left.
            continue
        fitting = [tensor for tensor in known if tensor in found and _equal(found[tensor], known[tensor])]
        share = 2 * len(fitting) / (len(known) + len(shapes))
        sizes = {size: found[t][axis] for t in fitting for axis, size in enumerate(known[t])}
        rated.append(_Network(name, width, settings, share, sizes.get(_ANY_CLASSES), sizes.get(_ANY_CHANNELS)))
    return rated


def _by_names_of(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values by name, renamed to the names by which a network in the table is known."""
    try:
        sources = rename(values, aliases(create_model(name, num_classes=2)))
    except UserError:  # A file that holds a tensor under both names belongs to another network.
        return dict(values)
    return {new: values[source] for new, source in sources.items()}


def _equal(shape: tuple[int, ...], known: tuple[int, ...]) -> bool:
    """Returns whether a shape equals a known one."""
    pairs = zip(shape, known, strict=False)
    return len(shape) == len(known) and all(size == k or k in (_ANY_CLASSES, _ANY_CHANNELS) for size, k in pairs)


def _fits(network: _Network, tensors: Mapping[str, np.ndarray]) -> bool:
    """Returns whether tensors can be imported as a network."""
    if network.classes is None or network.classes < 2 or network.channels is None:
        return False
    module = create_model(network.name, num_classes=network.classes, width=network.width, settings=network.settings)
    shapes = expected_shapes(module, network.channels)
    return not any(mismatches(module, shapes, _by_names_of(network.name, tensors)).values())


def _alike(name: str, width: float, count: Mapping[tuple[int, ...], int]) -> bool:
    """Returns whether each shape occurs as often as in a network, except in the stem and the classifier."""
    try:
        known = _known(name, width)
    except ValueError:  # A layer would have no channels left.
        return False
    fixed = [shape for shape in known.values() if not {_ANY_CLASSES, _ANY_CHANNELS} & set(shape)]
    wanted = collections.Counter(fixed)
    others = sum(count.values()) - sum(wanted.values())
    return others == len(known) - len(fixed) and all(count[shape] >= number for shape, number in wanted.items())
