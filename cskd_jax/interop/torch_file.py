"""Reads the tensors of a file that PyTorch wrote, or of a safetensors file, without PyTorch or trust in the file.

PyTorch's own files hold a state dict, a dictionary that holds one, or a whole network, each as a zip archive
(`torch.save` since 1.6) or as a sequence of pickles (before). The sizes that a file claims are checked against its
content before anything is read.
"""

import io
import math
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from cskd_jax.errors import UserError
from cskd_jax.interop import unpickle
from cskd_jax.interop.unpickle import Placeholder, Storage, Tensor, shown

_DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_SAFETENSORS_DTYPES = {
    "F32": np.float32,
    "F64": np.float64,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# The contents of the first and second pickle of the older format.
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
# A limit, because a network that contains itself would have no end.
_MAX_MODULES = 20_000
# Prefixes of wrappers around the network and around each other: torch.compile, DataParallel, torch.compile.
_WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")


def read_state_dict(path: pathlib.Path, key: str | None = None) -> dict[str, np.ndarray]:
    """Returns the tensors of a network by name, read-only and in PyTorch's layout, without prefixes of wrappers.

    Args:
      path: Path of the file.
      key: Key of the state dict or network in a dictionary that holds several.

    Returns:
      The tensors by name.

    Raises:
      UserError: If the file is damaged, asks for code to be executed, or holds no network.
      OSError: If the file cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = _read_safetensors(path.read_bytes())
        else:
            with path.open("rb") as file:
                is_zip = file.read(4) == b"PK\3\4"
            content, read = _read_zip(path) if is_zip else _read_pickles(path.read_bytes())
            tensors = _arrays(_find_tensors(content, key), read)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): array for name, array in tensors.items()}
    return {shown(name): array for name, array in tensors.items()}


def _read_safetensors(data):
    try:
        content = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise UserError(f"is not a sound safetensors file ({shown(str(error))})") from None
    tensors = {}
    for name, entry in content:
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise UserError(f"{shown(name)} is {entry['dtype']}; known: {', '.join(_SAFETENSORS_DTYPES)}")
        tensors[name] = np.frombuffer(entry["data"], _SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def _read_zip(path: pathlib.Path) -> tuple[Any, Callable[[Storage], bytes]]:
    """Returns the content of a zip archive and a function that reads the bytes of a storage."""
    try:
        with zipfile.ZipFile(path) as archive:
            # PyTorch does not compress, so it did not write an archive that unpacks to more than its size.
            sizes = sum(member.file_size for member in archive.infolist())
            compressed = any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
            if compressed or sizes > path.stat().st_size:
                raise UserError("is an archive that unpacks to more than it holds, not one of PyTorch")
            members = {name: archive.read(name) for name in archive.namelist()}
    except UserError:
        raise
    except Exception as error:  # A damaged archive makes zipfile raise errors of many kinds.
        raise UserError(f"is a damaged archive ({shown(str(error))})") from None
    root = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None)
    if root is None:
        raise UserError("is an archive without data.pkl: not one of torch.save")
    if f"{root}constants.pkl" in members:
        raise UserError("is a TorchScript program: save the state dict of the network instead")
    if members.get(f"{root}byteorder", b"little") != b"little":
        raise UserError("was written by a big-endian machine")
    content, _ = unpickle.load(io.BytesIO(members[f"{root}data.pkl"]))

    def read(storage):
        name = f"{root}data/{storage.key}"
        if name not in members:
            raise UserError(f"{shown(name)} is missing in it")
        return members[name]

    return content, read


def _read_pickles(data: bytes) -> tuple[Any, Callable[[Storage], bytes]]:
    """Returns the content of the older format and a function that reads the bytes of a storage.

    The format has five pickles: a number, a version, the byte order, the content, and the keys of the storages. The
    storages follow.
    """
    if not data.startswith(pickle.PROTO):
        raise UserError("is neither an archive nor a pickle: torch.save did not write it")
    stream = io.BytesIO(data)
    magic, _ = unpickle.load(stream)
    if magic != _MAGIC:
        raise UserError("is a pickle that torch.save did not write")
    version, _ = unpickle.load(stream)
    system, _ = unpickle.load(stream)
    if version != _VERSION or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UserError("is of an unknown version of PyTorch's format, or was written by a big-endian machine")
    content, storages = unpickle.load(stream)
    keys, _ = unpickle.load(stream)
    if not isinstance(keys, list) or any(not isinstance(key, str) or key not in storages for key in keys):
        raise UserError("does not say which storages it holds")
    values, view = {}, memoryview(data)
    for key in keys:
        begin = stream.tell() + 8
        size = int.from_bytes(data[begin - 8 : begin], "little") * _dtype(storages[key]).itemsize
        if begin + size > len(data):
            raise UserError(f"ends in the middle of storage {shown(key)}")
        values[key] = view[begin : begin + size]
        stream.seek(begin + size)

    def read(storage):
        if storage.key not in values:
            raise UserError(f"storage {shown(storage.key)} is missing in it")
        return values[storage.key]

    return content, read


def _find_tensors(content: Any, key: str | None) -> dict[str, Tensor]:
    """Returns the tensors of the one network that a file holds, or of that which `key` names."""
    inner = content if isinstance(content, dict) else {}
    networks = {name: tensors for name, value in inner.items() if (tensors := _tensors_of(value))}
    if key is not None:
        if key not in networks:
            raise UserError(f"holds no network under the key {key}; there are: {_listed(networks) or 'none'}")
        return networks[key]
    if len(networks) > 1:
        raise UserError(f"holds several networks, choose one by --key: {_listed(networks)}")
    tensors = next(iter(networks.values()), None) or _tensors_of(content)
    if not tensors:
        found = (
            f"a dictionary of {_listed(inner) or 'nothing'}" if isinstance(content, dict) else type(content).__name__
        )
        raise UserError(f"holds no tensors of a network, but {shown(found)}")
    return tensors


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(shown(name) if isinstance(name, str) else type(name).__name__ for name in list(names)[:10])


def _tensors_of(content: Any) -> dict[str, Tensor]:
    """Returns the tensors by name if this is a state dict or a pickled network, and else none."""
    return _tensors_of_network(content) if isinstance(content, Placeholder) else _named(content, Tensor)


def _named(content: Any, kind: type) -> dict[str, Any]:
    """Returns the entries of a dictionary that are of type `kind` and have a name."""
    items = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in items if isinstance(name, str) and isinstance(value, kind)}


def _tensors_of_network(network: Placeholder) -> dict[str, Tensor]:
    """Returns the state dict of a network: parameters and persistent buffers, its own and those of its parts."""
    tensors, pending, count = {}, [("", network)], 0
    while pending:
        prefix, module = pending.pop()
        count += 1
        if count > _MAX_MODULES:
            raise UserError(f"is a network of more than {_MAX_MODULES} modules")
        state = vars(module)
        passing = state.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, set) else ()
        for kind in ("_parameters", "_buffers"):
            values = _named(state.get(kind), Tensor)
            tensors |= {prefix + name: value for name, value in values.items() if name not in passing}
        pending += [(f"{prefix}{name}.", part) for name, part in _named(state.get("_modules"), Placeholder).items()]
    return tensors


def _arrays(tensors: dict[str, Tensor], read: Callable[[Storage], bytes]) -> dict[str, np.ndarray]:
    """Returns views of the bytes that hold the values; raises UserError if a tensor reaches beyond its storage."""
    arrays = {}
    for name, tensor in tensors.items():
        dtype, data = _dtype(tensor.storage), read(tensor.storage)
        if len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > 8:
            raise UserError(f"{shown(name)} has {len(tensor.shape)} sizes and {len(tensor.strides)} strides")
        # The stride of an axis of size 1 has no effect.
        strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.strides, strict=True)]
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
        needed = max(math.prod(tensor.shape), tensor.offset + steps + 1) * dtype.itemsize
        if 0 in tensor.shape or needed > len(data):
            raise UserError(f"{shown(name)} of shape {tensor.shape} does not fit the {len(data)} bytes of its storage")
        values = np.frombuffer(data, dtype, count=len(data) // dtype.itemsize)[tensor.offset :]
        strides = tuple(dtype.itemsize * stride for stride in strides)
        arrays[name] = np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)
    return arrays


def _dtype(storage: Storage) -> np.dtype:
    if storage.kind not in _DTYPES:
        raise UserError(f"its tensors are of type {shown(storage.kind)}; known: {', '.join(_DTYPES)}")
    return np.dtype(_DTYPES[storage.kind])
