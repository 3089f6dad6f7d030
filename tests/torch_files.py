"""Files as PyTorch writes them, sound and hostile, made without PyTorch; and variables to put into them."""

import struct
import zipfile
from typing import Any, NamedTuple

import jax
import numpy as np

from cskd_jax.models import create_model
from cskd_jax.training.adapters import LinenNetwork
from cskd_jax.training.state import init_network

MODULE = create_model("resnet8", num_classes=7, width=0.25)


class Global(NamedTuple):
    """A function or class that the pickle names."""

    module: str
    name: str


class Call(NamedTuple):
    """What a function returns when the pickle is read."""

    function: Any
    arguments: tuple


class Instance(NamedTuple):
    """An instance of a class with a state."""

    kind: Global
    state: Any


class Outside(NamedTuple):
    """What lies outside of the pickle."""

    key: tuple


class Raw(NamedTuple):
    """Operations of a pickle as they are."""

    code: bytes


def pickled(value):
    """The pickle of protocol 2 of a value made of the classes above and of Python's own."""
    return b"\x80\x02" + operations(value) + b"."


def operations(value):
    """Those that put a value onto the stack."""
    match value:
        case Raw(code):
            return code
        case Global(module, name):
            return f"c{module}\n{name}\n".encode()
        case Call(function, arguments):
            return operations(function) + _sequence(arguments) + b"R"
        case Instance(kind, state):
            return operations(kind) + b")\x81" + operations(state) + b"b"
        case Outside(key):
            return _sequence(key) + b"Q"
        case None | bool():
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            code = value.to_bytes(16, "little", signed=True)
            return b"\x8a" + bytes([len(code)]) + code
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return _sequence(value)
        case list():
            return b"](" + b"".join(map(operations, value)) + b"e"
        case dict():
            return b"}(" + b"".join(map(operations, (part for item in value.items() for part in item))) + b"u"


def _sequence(values):
    return b"(" + b"".join(map(operations, values)) + b"t"


ORDERED = Global("collections", "OrderedDict")
KINDS = {"f4": "FloatStorage", "f8": "DoubleStorage", "f2": "HalfStorage", "i8": "LongStorage"}


def ordered(items):
    """An OrderedDict."""
    return Call(ORDERED, ([tuple(item) for item in items.items()],))


def tensor(key, array, *, offset=0, shape=None, strides=None, size=None):
    """A tensor that is a whole storage, unless told otherwise."""
    shape = array.shape if shape is None else shape
    strides = tuple(stride // array.itemsize for stride in array.strides) if strides is None else strides
    kind = Global("torch", KINDS[array.dtype.str[1:]])
    storage = Outside(("storage", kind, key, "cuda:0", array.size if size is None else size))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, strides, False, ordered({})))


def state_dict(arrays):
    """({name: tensor}, {key: array}) of arrays by name."""
    keys = {name: str(number) for number, name in enumerate(arrays)}
    return (
        {name: tensor(keys[name], array) for name, array in arrays.items()},
        {keys[name]: array for name, array in arrays.items()},
    )


def network(tensors):
    """A pickled network of classes of a module `resnet`, from tensors by their names in a state dict."""
    own, parts = {}, {}
    for name, value in tensors.items():
        first, _, rest = name.partition(".")
        if rest:
            parts.setdefault(first, {})[rest] = value
        else:
            own[name] = value
    buffers = {name: value for name, value in own.items() if name.startswith(("running", "num_batches"))}
    rebuild = Global("torch._utils", "_rebuild_parameter")
    backend = Call(Global("torch.nn.backends.thnn", "_get_thnn_function_backend"), ())  # as before version 1.2
    parameters = {name: Call(rebuild, (own[name], True, ordered({}))) for name in own.keys() - buffers.keys()}
    state = {
        "training": False,
        "_backend": backend,
        "_parameters": ordered({**parameters, "not_there": None}),
        "_buffers": ordered(buffers),
        "_non_persistent_buffers_set": Call(Global("__builtin__", "set"), ([],)),
        "_modules": ordered({name: network(inner) for name, inner in parts.items()}),
    }
    return Instance(Global("resnet", "Block"), state)


def write_zip(path, content, storages, **members):
    """torch.save in its zip format; `members` are further files of the archive."""
    files = {"data.pkl": pickled(content), "byteorder": b"little", "version": b"3\n"} | members
    files |= {f"data/{key}": array.tobytes() for key, array in storages.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(f"archive/{name}", data)
    return path


def write_pickles(path, content, storages):
    """torch.save in the format before 1.6."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    pickles = (0x1950A86A20F9469CFC6C, 1001, system, content, list(storages))
    data = b"".join(map(pickled, pickles))
    data += b"".join(struct.pack("<q", array.size) + array.tobytes() for array in storages.values())
    path.write_bytes(data)
    return path


def random_variables(module):
    """Variables of a network without compiling it."""
    shapes, _ = jax.eval_shape(lambda: init_network(LinenNetwork(module), jax.random.PRNGKey(0), (32, 32, 3)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.random(leaf.shape, leaf.dtype), shapes)


def assert_same_variables(actual, expected):
    """The same names, shapes, types and values."""

    def same(path, ours, theirs):
        np.testing.assert_array_equal(ours, theirs, err_msg=jax.tree_util.keystr(path), strict=True)

    jax.tree.map_with_path(same, actual, expected)
