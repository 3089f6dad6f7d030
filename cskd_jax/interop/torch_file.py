"""Reads the tensors of a PyTorch or safetensors file, without PyTorch and without trusting the file.

PyTorch's own files hold a state dict, a dictionary that holds one, or a whole network, each as a zip archive
(`torch.save` since 1.6) or as a sequence of pickles (before). The sizes that a file claims are checked against its
content before anything is read.
"""

import contextlib
import functools
import io
import itertools
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from cskd_jax.errors import UserError, printable, raise_if_of_system
from cskd_jax.inputs import open_regular, parse_json, read_member, zip_of
from cskd_jax.interop import unpickle
from cskd_jax.interop.torch_objects import Placeholder, Storage, Tensor, is_name, shown

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
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
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
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
}
# The contents of the first and second pickle of the older format.
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_PLACE = ("dtype", "shape", "data_offsets")
# Limits on the sizes of a file, of its pickle and of the header of safetensors. VGG19 with Adam's state takes 1.7 GB.
MAX_FILE, _MAX_PICKLE, _MAX_HEADER = 4 << 30, 256 << 20, 8 << 20
# Limits on the axes of a tensor, on the product of their sizes, of which some may be zero, and on the values of all
# tensors that repeat those of their storage.
_MAX_DIMENSIONS, _MAX_VALUES, _MAX_REPEATED = 8, 2**40, 2**24
# Limits on the modules, because a network that contains itself would never end, and on the dictionary entries that are
# searched and the characters of their names, because many names can refer to the same large dictionary.
_MAX_MODULES, _MAX_SEARCH = 20_000, 16_000_000
_ENTRY = 64  # of the latter, for each entry in addition to its characters
# Prefixes of wrappers around the network, which may be nested: torch.compile, DataParallel, torch.compile.
_WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")


def read_state_dict(path: pathlib.Path, key: str | None = None) -> dict[str, np.ndarray]:
    """Returns the tensors of a network by name, read-only and in PyTorch's layout, without wrapper prefixes.

    Args:
      path: Path of the file.
      key: Key of the state dict or network in a dictionary that holds several.

    Returns:
      The tensors by name.

    Raises:
      UserError: If the file is damaged, asks for code to be executed, or holds no network.
      OSError: If the file cannot be read.
    """
    with open_regular(path, MAX_FILE) as file:
        try:
            if path.suffix.lower() == ".safetensors":
                tensors = _read_safetensors(file)
            elif file.peek(4)[:4] == b"PK\3\4":
                with _damaged_archive(), zip_of(file) as archive:
                    tensors = _read_zip(archive, os.fstat(file.fileno()).st_size, key)
            else:
                tensors = _read_pickles(file, key)
        except UserError as error:
            raise type(error)(f"{path}: {error}") from None
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): array for name, array in tensors.items()}
    named = {printable(name): array for name, array in tensors.items()}
    if len(named) < len(tensors):
        raise UserError(f"{path}: holds several tensors whose names differ only in characters that cannot be shown")
    return named


def _read_safetensors(file: io.BufferedReader) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file: the size of a header, the header in JSON, and the values."""
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    size = int.from_bytes(file.read(8), "little")
    if not 2 <= size <= min(_MAX_HEADER, end - 8):
        raise UserError(f"is not a valid safetensors file (its header has {size} bytes)")
    try:
        header = parse_json(file.read(size))
    except ValueError as error:
        raise UserError(f"is not a valid safetensors file ({shown(str(error))})") from None
    if not isinstance(header, dict):
        raise UserError("is not a valid safetensors file (its header is not an object)")
    header.pop("__metadata__", None)
    places = {name: _place(name, entry, end - 8 - size) for name, entry in header.items() if is_name(name)}
    if sum(stop - start for _, _, start, stop in places.values()) > end - 8 - size:
        raise UserError("is not a valid safetensors file (its tensors overlap)")
    tensors = {}
    for name, (dtype, shape, start, stop) in places.items():
        file.seek(8 + size + start)
        tensors[name] = np.frombuffer(file.read(stop - start), dtype).reshape(shape)
    return tensors


def _place(name: str, entry: Any, available: int) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Returns type, shape, start and end of a tensor that the header describes; checks that the file contains it."""
    values: Any = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = (values.get(key) for key in _PLACE)
    if not isinstance(kind, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise UserError(f"is not a valid safetensors file ({shown(name)} has no valid type, shape or place)")
    if kind not in _SAFETENSORS_DTYPES:
        raise UserError(f"{shown(name)} has type {shown(kind)}; known types: {', '.join(_SAFETENSORS_DTYPES)}")
    dtype, (start, stop) = np.dtype(_SAFETENSORS_DTYPES[kind]), offsets
    fits = 0 <= start <= stop <= available and math.prod(shape) * dtype.itemsize == stop - start
    if not fits or len(shape) > _MAX_DIMENSIONS or math.prod(max(axis, 1) for axis in shape) > _MAX_VALUES:
        raise UserError(
            f"is not a valid safetensors file ({shown(name)} of shape {shown(str(shape))} does not fit in it)"
        )
    return dtype, tuple(shape), start, stop


def _are_sizes(values):
    return isinstance(values, list) and len(values) <= 100 and all(type(v) is int and 0 <= v < 2**63 for v in values)


@contextlib.contextmanager
def _damaged_archive():
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # A damaged archive makes zipfile raise many kinds of errors.
        raise_if_of_system(error, "cannot be read")
        raise UserError(f"is a damaged archive ({shown(str(error))})") from None


def _read_zip(archive: zipfile.ZipFile, file_size: int, key: str | None) -> dict[str, np.ndarray]:
    """Returns the tensors of a file in PyTorch's zip format."""
    members = {member.filename: member for member in archive.infolist()}
    # torch.jit.save compresses a part, so this comes first.
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in members):
        raise UserError(
            "is a TorchScript program: save its state dict in PyTorch, "
            "torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE), and pass the new file"
        )
    # PyTorch does not compress, so it did not write an archive that unpacks to more than its size.
    sizes = sum(member.file_size for member in archive.infolist())
    compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members.values())
    if compressed or sizes > file_size:
        raise UserError("is an archive that unpacks to more than its own size, so PyTorch did not write it")
    root = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None)
    if root is None:
        raise UserError("is an archive without data.pkl: torch.save did not write it")
    byte_order = members.get(f"{root}byteorder")
    if byte_order is not None and read_member(archive, byte_order, 100) != b"little":
        raise UserError("was written on a big-endian machine")
    content, _ = unpickle.load(io.BytesIO(read_member(archive, members[f"{root}data.pkl"], _MAX_PICKLE)))

    @functools.cache
    def read(name):
        if name not in members:
            raise UserError(f"{shown(name)} is missing")
        return read_member(archive, members[name], file_size)

    return _arrays(_find_tensors(content, key), lambda storage: read(f"{root}data/{storage.key}"))


def _read_pickles(file: io.BufferedReader, key: str | None) -> dict[str, np.ndarray]:
    """Returns the tensors of a file in the older format.

    The format has five pickles: a number, a version, the byte order, the content, and the keys of the storages. The
    storages follow.
    """
    if file.read(1) != pickle.PROTO:
        raise UserError("is neither an archive nor a pickle: torch.save did not write it")
    file.seek(0)
    magic, _ = unpickle.load(file)
    if magic != _MAGIC:
        raise UserError("is a pickle that torch.save did not write")
    version, _ = unpickle.load(file)
    system, _ = unpickle.load(file)
    if version != _VERSION or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UserError("has an unknown version of PyTorch's format, or was written on a big-endian machine")
    content, storages = unpickle.load(file)
    keys, _ = unpickle.load(file)
    if not isinstance(keys, list) or any(type(key) is not str or key not in storages for key in keys):
        raise UserError("does not list the storages that it holds")
    places = {}
    position, end = file.tell(), file.seek(0, os.SEEK_END)
    for name in keys:
        file.seek(position)
        size = int.from_bytes(file.read(8), "little") * _dtype(storages[name]).itemsize
        places[name] = position + 8, size
        position += 8 + size
        if position > end:
            raise UserError(f"ends in the middle of storage {shown(name)}")

    @functools.cache
    def read(name):
        if name not in places:
            raise UserError(f"storage {shown(name)} is missing")
        file.seek(places[name][0])
        return file.read(places[name][1])

    return _arrays(_find_tensors(content, key), lambda storage: read(storage.key))


def _find_tensors(content: Any, key: str | None) -> dict[str, Tensor]:
    """Returns the tensors of the only network in a file, or of the one that `key` names."""
    inner, search = content if isinstance(content, dict) else {}, _Search()
    networks = {name: tensors for name, value in inner.items() if (tensors := search.tensors_of(value))}
    if key is not None:
        if key not in networks:
            raise UserError(f"holds no network under the key {key}; available keys: {_listed(networks) or 'none'}")
        return networks[key]
    if len(networks) > 1:
        raise UserError(f"holds several networks; choose one with --key: {_listed(networks)}")
    # A state dict may hold a dictionary, as a checkpoint may hold a tensor.
    tensors = max([*networks.values(), search.tensors_of(content)], key=len)
    if not tensors:
        found = (
            f"a dictionary of {_listed(inner) or 'nothing'}" if isinstance(content, dict) else type(content).__name__
        )
        raise UserError(f"holds {shown(found)}, not the tensors of a network")
    return tensors


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(shown, itertools.islice(names, 10)))


class _Search:
    """A search for networks that gives up if it would take too long."""

    def __init__(self):
        self._done = 0

    def tensors_of(self, content: Any) -> dict[str, Tensor]:
        """Returns the tensors by name if this is a state dict or a pickled network, and otherwise none."""
        return self._of_network(content) if isinstance(content, Placeholder) else self._named(content, Tensor)

    def _named(self, content: Any, kind: type, prefix: str = "") -> dict[str, Any]:
        """Returns the entries of a dictionary that are of type `kind`, with a prefix before their names."""
        found = {}
        for name, value in content.items() if isinstance(content, dict) else ():
            self._done += _ENTRY + len(prefix) + len(name)
            if self._done > _MAX_SEARCH:
                raise UserError(f"is a network of more than {_MAX_MODULES} modules, or has too many names")
            if isinstance(value, kind):
                found[prefix + name] = value
        return found

    def _of_network(self, network: Placeholder) -> dict[str, Tensor]:
        """Returns the state dict of a network: parameters and persistent buffers, its own and its submodules'."""
        tensors, pending, count = {}, [("", network)], 0
        while pending:
            prefix, module = pending.pop()
            count += 1
            if count > _MAX_MODULES:
                raise UserError(f"is a network of more than {_MAX_MODULES} modules")
            state = module.state
            passing = state.get("_non_persistent_buffers_set")
            passing = passing if isinstance(passing, set) else set()
            for kind in ("_parameters", "_buffers"):
                values = self._named(state.get(kind), Tensor, prefix)
                tensors |= {name: value for name, value in values.items() if name[len(prefix) :] not in passing}
            parts = self._named(state.get("_modules"), Placeholder, prefix)
            pending += [(f"{name}.", part) for name, part in parts.items()]
        return tensors


def _arrays(tensors: dict[str, Tensor], read: Callable[[Storage], bytes]) -> dict[str, np.ndarray]:
    """Returns views of the bytes that hold the values; raises UserError if a tensor extends beyond its storage."""
    arrays, repeated = {}, 0
    for name, tensor in tensors.items():
        dtype, data = _dtype(tensor.storage), read(tensor.storage)
        if len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > _MAX_DIMENSIONS:
            raise UserError(f"{shown(name)} has {len(tensor.shape)} sizes and {len(tensor.strides)} strides")
        if math.prod(max(size, 1) for size in tensor.shape) > _MAX_VALUES:
            raise UserError(f"{shown(name)} of shape {shown(str(tensor.shape))} is too large")
        if 0 in tensor.shape:
            arrays[name] = np.empty(tensor.shape, dtype)
            continue
        # The stride of an axis of size 1 has no effect.
        strides = [stride if size > 1 else 0 for size, stride in zip(tensor.shape, tensor.strides, strict=True)]
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
        # Views that expand a tensor repeat values; so could a hostile file, without end.
        repeated += max(0, math.prod(tensor.shape) - len(data) // dtype.itemsize)
        if (tensor.offset + steps + 1) * dtype.itemsize > len(data) or repeated > _MAX_REPEATED:
            raise UserError(
                f"{shown(name)} of shape {shown(str(tensor.shape))} does not fit in the {len(data)} bytes of its "
                "storage"
            )
        values = np.frombuffer(data, dtype, count=len(data) // dtype.itemsize)[tensor.offset :]
        strides = tuple(dtype.itemsize * stride for stride in strides)
        arrays[name] = np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)
    return arrays


def _dtype(storage: Storage) -> np.dtype:
    if storage.kind not in _DTYPES:
        raise UserError(f"its tensors have type {shown(storage.kind)}; known types: {', '.join(_DTYPES)}")
    return np.dtype(_DTYPES[storage.kind])
