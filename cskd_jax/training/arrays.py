"""Conversion of trees to and from named arrays, and digests of arrays."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util

from cskd_jax.errors import UserError

# Stands for a slash within a name, as Haiku has them, where slashes separate the names of a path.
_SLASH = "%2F"


def digest_of(tree: Any) -> str:
    """Returns a digest of all arrays of a tree and of their names."""
    arrays = flatten(jax.device_get(tree))
    return digest_json({name.replace(_SLASH, "/"): digest_array(array) for name, array in arrays.items()})


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Returns {path joined by "/": numpy array} for a tree, with the names that Flax gives to its parts.

    Of a typed key, such as the state of an optimizer that adds noise may hold, it returns the data.
    """
    flat: dict[str, Any] = _join(traverse_util.flatten_dict(serialization.to_state_dict(tree)))
    return {name: np.asarray(jax.random.key_data(x) if _is_key(x) else x) for name, x in flat.items()}


def nest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dictionary that `flatten` has made into {path joined by "/": array}."""
    split = (tuple(part.replace(_SLASH, "/") for part in name.split("/")) for name in arrays)
    return traverse_util.unflatten_dict(dict(zip(split, arrays.values(), strict=True)))


def _join(flat):
    return {"/".join(name.replace("/", _SLASH) for name in path): leaf for path, leaf in flat.items()}


def unflatten(arrays: dict[str, np.ndarray], template: Any) -> Any:
    """Returns a tree like `template` with these arrays; raises UserError if names, shapes or dtypes differ."""
    target = serialization.to_state_dict(template)
    flat: dict[str, Any] = _join(traverse_util.flatten_dict(target, keep_empty_nodes=True))
    empty = traverse_util.empty_node
    keys = {name: leaf for name, leaf in flat.items() if _is_key(leaf)}
    flat |= {name: jax.eval_shape(jax.random.key_data, leaf) for name, leaf in keys.items()}
    wanted = {name for name, leaf in flat.items() if leaf is not empty}
    for name in sorted(wanted | set(arrays)):
        found, expected = arrays.get(name), flat.get(name) if name in wanted else None
        shapes = ["nothing" if x is None else f"{x.dtype}{list(x.shape)}" for x in (found, expected)]
        if shapes[0] != shapes[1]:
            raise UserError(
                "the arrays of the checkpoint do not match the networks, losses and optimizer of this run "
                f"({name}: {shapes[0]} instead of {shapes[1]}); use another workdir"
            )
    flat |= arrays
    flat |= {name: jax.random.wrap_key_data(flat[name], impl=_implementation(leaf)) for name, leaf in keys.items()}
    return serialization.from_state_dict(template, nest(flat))


def _is_key(leaf):
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _implementation(key):
    """Returns the implementation of a typed key, of which only the shape and dtype need be known."""
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.random.key(0, impl=name).dtype == key.dtype:
            return name
    raise UserError(f"the checkpoint holds a random key of the unknown type {key.dtype}")


def digest_array(array: np.ndarray) -> str:
    """Returns a digest of the type, shape and bytes of an array."""
    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).hexdigest()


def digest_json(content: Any) -> str:
    """Returns a digest of JSON-serializable content that does not depend on the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def upgrade(name: str) -> str:
    """Returns the current name of an array that was called `name` in version 1 checkpoints."""
    if name.startswith("batch_stats/"):
        return f"collections/{name}"
    # In an optimizer state, too, the parameters are nested under these two names.
    match = re.match(r"((?:params|opt_state)/(?:.*?/)??)(student|methods)(/.*)", name)
    if match is None:
        return name
    return match[1] + {"student": "network", "methods": "losses"}[match[2]] + match[3]
