"""Conversion between the variables of a network and its PyTorch state dict, by one table for both directions."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from cskd_jax.errors import UserError
from cskd_jax.interop.families import family_of
from cskd_jax.models.vision_transformer import VisionTransformer
from cskd_jax.training.adapters import LinenNetwork
from cskd_jax.training.state import init_network

# {name of an array in this package: (0 for the layer or 1 for the normalization, its name there)}
_ARRAYS = {
    "kernel": (0, "weight"),
    "projection": (0, "weight"),
    "conv_bias": (0, "bias"),
    "scale": (1, "weight"),
    "bias": (1, "bias"),
    "mean": (1, "running_mean"),
    "var": (1, "running_var"),
    "gamma": (0, "gamma"),
}
# Arrays of the network itself that have the same names in PyTorch.
_SAME_ARRAYS = frozenset({"cls_token", "dist_token", "reg_token", "pos_embed"})
# PyTorch counts the batches seen by a normalization; nothing reads the count.
_COUNT = "num_batches_tracked"
# Number of names of each kind that an error lists.
_LISTED = 6


def from_torch(
    module: nn.Module, channels: int, state_dict: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Converts the PyTorch state dict of a network to its variables.

    Args:
      module: Network.
      channels: Number of channels of its images.
      state_dict: Floating-point arrays by name, in PyTorch's layout.

    Returns:
      A tuple of {"params", and other collections} of numpy arrays in the dtypes of the network, {name in `state_dict`:
      path in the network} of the arrays that were used, and the names of those that were not needed.

    Raises:
      UserError: If tensors are missing, unknown, of another shape, not floating-point, or not finite.
    """
    family, wanted = family_of(module), _abstract_variables(module, channels)
    sources = {path: _torch_name(family, path) for path in wanted}
    shapes = {name: _torch_shape(wanted[path].shape) for path, name in sources.items()}
    _refuse(mismatches(module, shapes, state_dict))
    unused = [name for name in state_dict if name not in shapes]
    found = {path: state_dict[name] for path, name in sources.items()}
    arrays = {path: _from_torch_layout(array, wanted[path].dtype) for path, array in found.items()}
    _refuse({"not finite": {sources[path]: "" for path, array in arrays.items() if not np.isfinite(array).all()}})
    used = {name: "/".join(path) for path, name in sources.items()}
    return traverse_util.unflatten_dict(arrays), used, unused


def expected_shapes(module: nn.Module, channels: int) -> dict[str, tuple[int, ...]]:
    """Returns {PyTorch's name: PyTorch's shape} of all arrays of a network for images with `channels` channels."""
    family = family_of(module)
    variables = _abstract_variables(module, channels)
    return {_torch_name(family, path): _torch_shape(array.shape) for path, array in variables.items()}


def aliases(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Returns the pairs (regular expression, replacement) that turn other names of a network into those used here."""
    return family_of(module).aliases


def mismatches(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], state_dict: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Compares a state dict with the arrays that a network has.

    Args:
      module: Network.
      shapes: Its `expected_shapes`.
      state_dict: Arrays by name.

    Returns:
      {kind of mismatch: {name: details}}, with an empty dictionary for each kind that does not occur.
    """
    family, both = family_of(module), [name for name in shapes if name in state_dict]
    return {
        "missing": {name: shape for name, shape in shapes.items() if name not in state_dict},
        "unknown": {
            name: array.shape
            for name, array in state_dict.items()
            if not (name in shapes or name.endswith(f".{_COUNT}") or re.fullmatch(family.unused, name))
        },
        "of the wrong shape": {
            name: f"{state_dict[name].shape} instead of {shapes[name]}"
            for name in both
            if state_dict[name].shape != shapes[name]
        },
        "not floating-point": {
            name: state_dict[name].dtype for name in both if not jnp.issubdtype(state_dict[name].dtype, np.floating)
        },
    }


def to_torch(module: nn.Module, variables: Mapping[str, Any], batches: int) -> dict[str, np.ndarray]:
    """Converts the variables of a network to its PyTorch state dict, made of contiguous arrays.

    Args:
      module: Network.
      variables: Variables of the network, such as {"params", "batch_stats"}.
      batches: Number of batches that the network was trained on, which PyTorch keeps with every normalization.

    Returns:
      The arrays by PyTorch's names.
    """
    family, state_dict = family_of(module), {}
    for path, array in traverse_util.flatten_dict(dict(variables)).items():
        name = _torch_name(family, path)
        state_dict[name] = np.ascontiguousarray(_transpose(np.asarray(array), (3, 2, 0, 1)))
        if path[-1] == "mean":
            state_dict[name.replace("running_mean", _COUNT)] = np.asarray(batches, np.int64)
    return state_dict


def _abstract_variables(module: nn.Module, channels: int) -> dict[tuple[str, ...], Any]:
    """Returns {path: shape and dtype} of the variables."""
    size = (32, 32)  # Only the position embedding of a Vision Transformer depends on it.
    if isinstance(module, VisionTransformer):
        size = module.image_size or (2 * module.patch_size, 2 * module.patch_size)
    variables, _ = jax.eval_shape(lambda: init_network(LinenNetwork(module), jax.random.PRNGKey(0), (*size, channels)))
    return traverse_util.flatten_dict(variables)


def _torch_name(family, path):
    """Returns PyTorch's name of the array at (collection, module, ..., name)."""
    if path[-1] in _SAME_ARRAYS:
        return path[-1]
    which, suffix = _ARRAYS[path[-1]]
    for pattern, names in family.rules.items():
        if match := re.fullmatch(pattern, "/".join(path[1:-1])):
            groups = (int(group) if group.isdigit() else group for group in match.groups())
            return f"{names(*groups)[which]}.{suffix}"
    raise ValueError(f"no rule gives the PyTorch name of {'/'.join(path)}")


def _transpose(array, kernel_axes):
    """Transposes kernels by `kernel_axes` and matrices; arrays with one axis, and tokens, stay as they are."""
    return array.transpose(kernel_axes) if array.ndim == 4 else array.T if array.ndim == 2 else array


def _from_torch_layout(array, dtype):
    with np.errstate(over="ignore"):  # Values that overflow to infinity are rejected.
        return np.ascontiguousarray(_transpose(array, (2, 3, 1, 0))).astype(dtype)


def _torch_shape(shape):
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(len(shape), range(len(shape)))
    return tuple(shape[axis] for axis in axes)


def _refuse(problems):
    """Raises UserError if there are problems, given as {kind: {name: details}}."""
    lines = []
    for kind, names in problems.items():
        shown = [f"{name} {text}".strip() for name, text in list(names.items())[:_LISTED]]
        rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        if names:
            lines.append(f"{kind}: {', '.join(shown)}{rest}")
    if lines:
        raise UserError("the tensors do not fit the network; " + "; ".join(lines))
