"""The parsers of files from outside, on random inputs: they return, or raise the one error that a command shows.

FUZZ=200000 in the environment reads so many inputs for each parser instead of a few; see docs/security.md.
"""

import io
import json
import os
import pathlib
import struct

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cskd_jax.errors import UserError
from cskd_jax.interop import unpickle
from cskd_jax.interop.torch_file import read_state_dict
from cskd_jax.runs import results, schema
from cskd_jax.training.checkpoint import Record
from cskd_jax.training.records import read_rows
from tests.hostile_inputs import pickles
from tests.report_runs import write_run

_EXAMPLES = int(os.environ.get("FUZZ", "0"))
fixed = settings(
    max_examples=_EXAMPLES or 200,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

# Operations of pickles with operands that often fit together.
_OPERATIONS = [bytes([code]) for code in b"()}]N.02abdeolstu\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94RQ"]
_OPERATIONS += [b"K\x01", b"h\x00", b"q\x00", b"X\x01\x00\x00\x00a", b"U\x01a", b"\x8a\x01\x07", b"I01\n", b"p0\n"]
_OPERATIONS += [b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"]
_OPERATIONS += [b"ctorch\nSize\n", b"cbuiltins\nset\n", b"cresnet\nNet\n", b"X\x07\x00\x00\x00storage", b"G" + bytes(8)]
_PICKLES = st.one_of(
    st.binary(max_size=200),
    st.lists(st.one_of(st.sampled_from(_OPERATIONS), st.binary(max_size=3)), max_size=60).map(b"".join),
    st.tuples(
        st.sampled_from(sorted(pickles().values(), key=len)[:80]), st.integers(0, 400), st.binary(max_size=4)
    ).map(lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + len(parts[2]) :]),
)
# Chosen rather than generated, which is a hundred times quicker.
_SCALARS = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2**31,
    2**63,
    -(2**64),
    10**60,
    0.5,
    -0.0,
    1e300,
    float("inf"),
    float("nan"),
]
_TEXTS = ["", "a", "test", "student", "F32", "0.5", "\x00", "\x1b[2J", "\ud800", "=1", "é" * 50]
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
_JSON = st.sampled_from([*_SCALARS, *_TEXTS, *_NESTED])


@fixed
@given(_PICKLES)
def test_pickles(data):
    try:
        content, storages = unpickle.load(io.BytesIO(data))
    except UserError:
        return
    assert isinstance(storages, dict)
    assert type(content) is not type(test_pickles)


_ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "U8", "X"]), _JSON),
        "shape": st.one_of(st.lists(st.integers(0, 4), max_size=4), _JSON),
        "data_offsets": st.one_of(st.tuples(st.integers(0, 16), st.integers(0, 64)), _JSON),
    },
)
_HEADERS = st.one_of(_JSON, st.dictionaries(st.text(max_size=4), st.one_of(_ENTRIES, _JSON), max_size=3))


@fixed
@given(_HEADERS, st.binary(max_size=80), st.integers(-2, 2), st.booleans())
def test_safetensors(tmp_path_factory, header, data, difference, damaged):
    path = _file(tmp_path_factory, "x.safetensors")
    text = data if damaged else json.dumps(header).encode()
    size = struct.pack("<Q", max(0, len(text) + difference * (len(data) % 2)))
    path.write_bytes(size + text + data)
    try:
        tensors = read_state_dict(path)
    except UserError:
        return
    assert all(array.size * array.itemsize <= len(data) for array in tensors.values())


@fixed
@given(st.dictionaries(st.sampled_from([*Record.__dataclass_fields__, "version"]), _JSON), _JSON)
def test_records(values, width):
    sound = {"network": {"name": "resnet8", "width": width}, "channels": 3}
    try:
        record = Record.from_json(sound | values)
    except ValueError:
        return
    assert isinstance(record.describe_network(), str)
    assert isinstance(record.finished, bool)


@fixed
@given(st.lists(st.tuples(st.integers(0, 30), _JSON), max_size=3), st.binary(max_size=20), st.booleans())
def test_results(tmp_path_factory, changes, data, damaged):
    path = _file(tmp_path_factory, "results.json")
    folder = path.with_name("sound")
    if not folder.exists():
        write_run(folder, "digits", "kd", 0, 0.5)
    values = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    places = [(values, key) for key in values]
    places += [(inner, key) for inner in values.values() if isinstance(inner, dict) for key in list(inner)[:8]]
    for place, value in changes:
        owner, key = places[place % len(places)]
        owner[key] = value
    text = json.dumps(values).encode()
    path.write_bytes(text[: len(text) // 2] + data + text[len(text) // 2 :] if damaged else text)
    try:
        found = results.read_results(path)
    except UserError:
        return
    schema.complete(found["config"])


_ROWS = st.dictionaries(st.sampled_from(["phase", "split", "step", "epoch", "top1"]), _JSON)


@fixed
@given(st.lists(st.one_of(st.binary(max_size=40), _ROWS), max_size=5))
def test_rows(tmp_path_factory, lines):
    path = _file(tmp_path_factory, "metrics.jsonl")
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    for row in read_rows(path):
        assert isinstance(row["phase"], str)
        assert all(abs(value) < 1e300 for key, value in row.items() if key not in ("phase", "split"))


_FOLDERS: dict[str, pathlib.Path] = {}


def _file(factory, name):
    """Returns the same path for all examples of a test, since a folder for each would take most of the time."""
    if name not in _FOLDERS:
        _FOLDERS[name] = factory.mktemp("parser")
    return _FOLDERS[name] / name
