"""Random inputs for the parsers of files from outside: mutations of real files, and generated ones.

`tests/test_parsers.py` reads a few, `benchmarks/fuzz.py` any number. Every input is a file name, which says what reads
it, and the content of the file.
"""

import copy
import functools
import io
import json
import pathlib
import random
import struct
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cskd_jax.errors import UserError
from cskd_jax.inputs import parse_json
from cskd_jax.interop import unpickle
from cskd_jax.interop.torch_file import read_state_dict
from cskd_jax.runs import results, schema
from cskd_jax.training.records import read_rows
from cskd_jax.training.saved import Record
from tests import torch_files
from tests.hostile_inputs import pickles
from tests.report_runs import write_run

Input = tuple[str, bytes]
_LARGEST = 1 << 16

# Values at which something may change.
_NUMBERS = [0, 1, 2, 7, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_SCALARS = [None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**64), 10**60, 0.5, -0.0, 1e300]
_SCALARS += [float("inf"), float("nan"), "", "a", "test", "student", "F32", "0.5", "\x00", "\x1b[2J", "\ud800", "=1"]
_SCALARS += ["é" * 50, "resnet8"]
_NESTED = [
    [],
    [1],
    [1, 1],
    [0.5],
    ["a"],
    [[]],
    {},
    {"a": 1},
    {"name": "a"},
    {"epoch": 1, "top1": 0.5},
    {"a": {"b": []}},
]
_JSON = [*_SCALARS, *_NESTED]

# Operations of pickles with operands that often fit together.
_OPERATIONS = [bytes([code]) for code in b"()}]N.02abdeolstu\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94RQ"]
_OPERATIONS += [b"K\x01", b"h\x00", b"q\x00", b"X\x01\x00\x00\x00a", b"U\x01a", b"\x8a\x01\x07", b"I01\n", b"p0\n"]
_OPERATIONS += [b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"]
_OPERATIONS += [b"ctorch\nSize\n", b"cbuiltins\nset\n", b"cresnet\nNet\n", b"X\x07\x00\x00\x00storage", b"G" + bytes(8)]


def mutated(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """Returns bytes with one to four changes: bytes, numbers, parts removed, repeated, or taken from elsewhere."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        begin = rng.randrange(len(data) + 1)
        end = min(len(data), begin + rng.choice((1, 1, 2, 4, 8, 16, 64, 1024)))
        match rng.randrange(7):
            case 0:
                part = rng.randbytes(end - begin)
            case 1:
                part = rng.choice(_NUMBERS).to_bytes(8, rng.choice(("little", "big")))[: rng.choice((1, 2, 4, 8))]
                end = begin + len(part)
            case 2:
                part = b""
            case 3:
                part = data[begin:end] * 2
            case 4:
                part = other[begin : begin + rng.choice((4, 16, 64))]
            case 5:
                part, end = b"", len(data) if rng.random() < 0.2 else begin
            case _:
                part, end = rng.choice(_OPERATIONS), begin
        data = data[:begin] + part + data[end:]
    return data[:_LARGEST]


# Weights as PyTorch writes them.


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"conv1.weight": (2, 3, 3, 3), "bn1.running_mean": (2,), "fc.weight": (2, 2), "fc.bias": (2,)}
    return {name: rng.random(shape, np.float32) for name, shape in shapes.items()}


def _written(write: Callable[[pathlib.Path], Any]) -> bytes:
    """Returns what a function writes into a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "file"
        write(path)
        return path.read_bytes()


@functools.cache
def _real_weights() -> list[bytes]:
    """Returns files in both formats of PyTorch: a state dict, one within a checkpoint, and a pickled network."""
    tensors, storages = torch_files.state_dict(_arrays())
    contents = [tensors, {"epoch": 3, "state_dict": tensors, "best": 0.5}, torch_files.network(tensors)]
    writers = (torch_files.write_zip, torch_files.write_pickles)
    return [_written(lambda path, w=w, c=c: w(path, c, storages)) for w in writers for c in contents]


@functools.cache
def _real_pickles() -> list[bytes]:
    """Returns the pickles of those files, and hostile ones of a size that a thousand can be made of in a second."""
    archives = [zipfile.ZipFile(io.BytesIO(data)) for data in _real_weights() if data.startswith(b"PK")]
    found = [archive.read("archive/data.pkl") for archive in archives]
    return 4 * found + [data for data in pickles().values() if len(data) < 4096]


def weights(rng: random.Random) -> Input:
    """Returns a pickle, or a file of weights around one."""
    match rng.randrange(4):
        case 0:
            parts = (
                rng.choice(_OPERATIONS) if rng.random() < 0.9 else rng.randbytes(3) for _ in range(rng.randrange(60))
            )
            return "x.pickle", b"".join(parts)
        case 1:
            return "x.pickle", mutated(rng, rng.choice(_real_pickles()), rng.choice(_real_pickles()))
        case 2:
            return "x.pth", mutated(rng, rng.choice(_real_weights()), rng.choice(_real_weights()))
    # A sound archive around a pickle that is not; its checksums would give it away otherwise.
    buffer, storages = io.BytesIO(), torch_files.state_dict(_arrays())[1]
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(
            "archive/data.pkl", mutated(rng, rng.choice(_real_pickles()[:12]), rng.choice(_real_pickles()))
        )
        for name, array in storages.items():
            archive.writestr(f"archive/data/{name}", array.tobytes())
    return "x.pth", buffer.getvalue()


# Safetensors.


@functools.cache
def _real_safetensors() -> tuple[dict[str, Any], bytes]:
    """Returns the header and the values of a file."""
    header, values = {"__metadata__": {"format": "pt"}}, b""
    for name, array in _arrays().items():
        end = len(values) + array.nbytes
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [len(values), end]}
        values += array.tobytes()
    return header, values


def safetensors(rng: random.Random) -> Input:
    """Returns a safetensors file with a changed or a generated header, or with changed bytes."""
    header, values = _real_safetensors()
    kind = rng.randrange(3)
    if kind == 0:
        values = rng.randbytes(rng.randrange(80))
        names = ["", "a", "b", "__metadata__"]
        header = (
            {rng.choice(names): _entry(rng) for _ in range(rng.randrange(4))}
            if rng.random() < 0.9
            else rng.choice(_JSON)
        )
    elif kind == 1:
        header = changed(rng, header)
    text = json.dumps(header).encode()
    data = struct.pack("<Q", max(0, len(text) + rng.choice((0, 0, 0, 0, -1, 1, 7)))) + text + values
    return "x.safetensors", mutated(rng, data) if kind == 2 else data


def _entry(rng):
    entry = {
        "dtype": rng.choice(["F32", "BF16", "U8", "X"]),
        "shape": [rng.randrange(5) for _ in range(rng.randrange(4))],
        "data_offsets": [rng.randrange(17), rng.randrange(65)],
    }
    return changed(rng, entry) if rng.random() < 0.5 else entry


# Records, results and metrics.


def changed(rng: random.Random, value: Any) -> Any:
    """Returns a copy of a JSON value in which one to three values, somewhere within, are others or missing."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        inner, key = [value], 0
        while isinstance(inner[key], dict | list) and inner[key] and rng.random() < 0.8:
            inner = inner[key]
            key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if inner[key] is value:
            continue
        if rng.random() < 0.2:
            del inner[key]
        else:
            inner[key] = copy.deepcopy(rng.choice(_JSON))
        if rng.random() < 0.1 and isinstance(inner, dict):
            inner[rng.choice([text for text in _JSON if isinstance(text, str)])] = copy.deepcopy(rng.choice(_JSON))
    return value


@functools.cache
def _real_runs() -> dict[str, list[Any]]:
    """Returns the contents of results.json and metrics.jsonl, config.json and a record as runs write them."""
    found: dict[str, list[Any]] = {"results.json": [], "metrics.jsonl": [], "config.json": []}
    with tempfile.TemporaryDirectory() as folder:
        for word in ("ce", "kd", "cskd"):
            run = pathlib.Path(folder) / word
            write_run(run, "digits", word, 0, 0.5)
            written = json.loads((run / "results.json").read_text(encoding="utf-8"))
            found["results.json"].append(written)
            found["config.json"].append(written["config"] | {"dataset fingerprint": "0" * 64})
            found["metrics.jsonl"].append(
                [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            )
    network = {"network": {"name": "resnet8", "width": 0.25}, "channels": 3, "version": 2}
    images = {"size": [8, 8], "mean": [0.5], "std": [0.5]}
    evaluation = {"epoch": 1, "top1": 0.5, "loss": 1.0}
    progress = {
        "sums": {"loss": 1.0},
        "count": 3,
        "evaluations": {"last": evaluation, "best": evaluation},
        "seconds": 1.0,
    }
    rest = {"categories": ["cat", "dog"], "images": images, "method": "kd", "finished": True, "progress": progress}
    return found | {"record.json": [network, network | rest]}


def records(rng: random.Random) -> Input:
    """Returns the record of a checkpoint, results, a configuration or metrics, with changed values or changed bytes."""
    name = rng.choice(sorted(_real_runs()))
    value = rng.choice(_real_runs()[name])
    if rng.random() < 0.8:
        value = changed(rng, value)
    if name == "metrics.jsonl":
        rows = value if isinstance(value, list) else [value]
        data = b"\n".join(json.dumps(row).encode() for row in rows) + b"\n"
    else:
        data = json.dumps(value).encode()
    return name, mutated(rng, data) if rng.random() < 0.3 else data


def real() -> list[Input]:
    """Returns the real files, unchanged."""
    header, values = _real_safetensors()
    text = json.dumps(header).encode()
    found = [("x.pth", data) for data in _real_weights()]
    found += [("x.safetensors", struct.pack("<Q", len(text)) + text + values)]
    for name, contents in _real_runs().items():
        parts = (content if name == "metrics.jsonl" else [content] for content in contents)
        found += [(name, b"\n".join(json.dumps(row).encode() for row in rows)) for rows in parts]
    return found


GENERATORS: Mapping[str, Callable[[random.Random], Input]] = {
    "pickle": weights,
    "safetensors": safetensors,
    "records": records,
}


# What reads them. All return nothing, or raise UserError for what is refused.


def _read_pickle(path):
    content, storages = unpickle.load(io.BytesIO(path.read_bytes()))
    assert isinstance(storages, dict)
    assert type(content) is not type(_read_pickle)


def _read_weights(path):
    tensors = read_state_dict(path)
    assert all(isinstance(array, np.ndarray) and name.isprintable() for name, array in tensors.items())
    assert all(array.nbytes <= _LARGEST for array in tensors.values())


def _read_safetensors(path):
    assert sum(array.nbytes for array in read_state_dict(path).values()) <= path.stat().st_size


def _read_record(path):
    try:
        record = Record.from_json(parse_json(path.read_bytes()))
    except ValueError as error:  # This is what the reader of checkpoints turns into its own error.
        raise UserError(str(error)) from None
    assert isinstance(record.describe_network(), str)
    assert isinstance(record.finished, bool)


def _read_results(path):
    schema.complete(results.read_results(path)["config"])


def _read_config(path):
    schema.complete(schema.read_flat(path))


def _read_metrics(path):
    for row in read_rows(path):
        assert isinstance(row["phase"], str)
        assert all(abs(value) < 1e300 for key, value in row.items() if key not in ("phase", "split"))


_READERS = {
    "x.pickle": _read_pickle,
    "x.pth": _read_weights,
    "x.safetensors": _read_safetensors,
    "record.json": _read_record,
    "results.json": _read_results,
    "config.json": _read_config,
    "metrics.jsonl": _read_metrics,
}


def read(given: Input, folder: pathlib.Path) -> bool:
    """Writes an input and reads it as the package does; returns whether it was accepted, or else refused.

    Any other outcome is an exception: of the parser, or AssertionError for a result that it must not have.
    """
    name, data = given
    path = folder / name
    path.write_bytes(data)
    try:
        _READERS[name](path)
    except UserError:
        return False
    return True
