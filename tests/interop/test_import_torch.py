"""Files of PyTorch become checkpoints: every format, and nothing that a file asks for is executed."""

import hashlib
import io
import json
import pickle
import struct
import tarfile
import tracemalloc
import types
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from cskd_jax.interop import checkpoints, export, import_torch, nearest, unpickle
from cskd_jax.interop.import_torch import main
from cskd_jax.interop.names import to_torch
from cskd_jax.interop.renames import read_rules, rename
from cskd_jax.interop.torch_file import read_state_dict
from cskd_jax.models import MODELS, create_model
from cskd_jax.runs import lock
from cskd_jax.training.checkpoint import load_variables
from tests import torch_files
from tests.torch_files import (
    Call,
    Global,
    Instance,
    Outside,
    Raw,
    network,
    operations,
    pickled,
    random_variables,
    write_pickles,
    write_zip,
)


@pytest.fixture(autouse=True)
def few_known_networks(monkeypatch):
    """The nearest network is looked for among a few, because tracing all of them takes seconds."""
    monkeypatch.setattr(nearest, "MODELS", {name: MODELS[name] for name in ("resnet8", "vgg8")})


def run(file, out, *arguments):
    return main(
        ["import_torch", str(file), "--model=resnet8", "--width=0.25", "--num_classes=7", *arguments, f"--out={out}"]
    )


# name -> content of the file from the tensors by name
CONTENTS = {
    "state dict": dict,
    "checkpoint": lambda tensors: {"epoch": 3, "best": 0.5, "model": tensors, "optimizer": {"state": {}}},
    "state dict with a dictionary": lambda tensors: {**tensors, "extra": {"bias": tensors["fc.bias"]}},
    "of DataParallel": lambda tensors: {f"module.{name}": value for name, value in tensors.items()},
    "network": network,
    "network of DataParallel": lambda tensors: Instance(
        Global("torch.nn.parallel.data_parallel", "DataParallel"),
        {"_modules": {"module": network(tensors)}, "src_device_obj": Call(Global("torch", "device"), ("cuda", 0))},
    ),
    "network with its source": lambda tensors: network(tensors)._replace(
        kind=Outside(("module", Global("resnet", "ResNet"), "resnet.py", "raise RuntimeError"))
    ),
    "checkpoint with a network": lambda tensors: {
        "net": network(tensors),
        "accuracy": Call(
            Global("numpy.core.multiarray", "scalar"), (Call(Global("numpy", "dtype"), ("f8",)), "12345678")
        ),
    },
    "state dict beside a schedule and settings": lambda tensors: {
        "model": tensors,
        "milestones": Call(Global("collections", "Counter"), ({"60": 1},)),
        "history": Call(Global("collections", "deque"), ([], 5)),
        "folder": Call(Global("pathlib", "PosixPath"), ("/", "tmp")),
        "date": Call(Global("datetime", "date"), (2020, 1, 1)),
        "set": Call(Global("__builtin__", "frozenset"), (["a"],)),
    },
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("write", [write_zip, write_pickles])
def test_formats(write, content, arrays, tmp_path):
    tensors, storages = torch_files.state_dict(arrays)
    read = read_state_dict(write(tmp_path / "file.pth", CONTENTS[content](tensors), storages))
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array, err_msg=name)


def test_views_and_types(tmp_path):
    values = np.arange(24, dtype=np.float64).reshape(4, 6)
    content = {
        "transposed": torch_files.tensor("a", values, shape=(6, 4), strides=(1, 6)),
        "part": torch_files.tensor("a", values, offset=8, shape=(2, 3), strides=(6, 1)),
        "half": torch_files.tensor("b", np.array([0.5, -3], np.float16)),
        "scalar": torch_files.tensor("c", np.array(7, np.int64)),
        "empty": torch_files.tensor("c", np.array(7, np.int64), shape=(3, 0), strides=(1, 1)),
        "expanded": torch_files.tensor("b", np.array([0.5, -3], np.float16), shape=(3, 2), strides=(0, 1)),
    }
    storages = {"a": values, "b": np.array([0.5, -3], np.float16), "c": np.array(7, np.int64)}
    read = read_state_dict(write_pickles(tmp_path / "file.pth", content, storages))
    np.testing.assert_array_equal(read["transposed"], values.T)
    np.testing.assert_array_equal(read["part"], values[1:3, 2:5])
    assert (read["empty"].shape, read["expanded"].tolist()) == ((3, 0), 3 * [[0.5, -3]])
    assert (read["half"].dtype, read["half"].tolist(), read["scalar"][()]) == (np.float16, [0.5, -3], 7)
    safe = {"x": values, "y": values.astype(jnp.bfloat16)}
    header = {
        name: {"dtype": kind, "shape": [4, 6], "data_offsets": [start, end]}
        for name, kind, start, end in (("x", "F64", 0, 192), ("y", "BF16", 192, 240))
    }
    text = json.dumps(header).encode()
    path = tmp_path / "file.SAFETENSORS"
    path.write_bytes(struct.pack("<Q", len(text)) + text + safe["x"].tobytes() + safe["y"].tobytes())
    read = read_state_dict(path)
    np.testing.assert_array_equal(read["x"], values)
    np.testing.assert_array_equal(read["y"].astype(np.float64), values)


def test_checkpoint_is_written(variables, arrays, tmp_path, capsys):
    file, names = tmp_path / "weights.safetensors", tmp_path / "names.txt"
    safetensors.numpy.save_file(arrays | {"branch4.weight": np.ones((24, 16, 1, 1), np.float32)}, file)
    names.write_text("".join(f"category {n}\n" for n in range(7)))
    assert run(file, tmp_path / "teacher", f"--categories={names}") == 0
    assert "47 tensors used, 0 missing, 10 not needed" in capsys.readouterr().out
    loaded, record, *_ = load_variables(str(tmp_path / "teacher"))
    torch_files.assert_same_variables(loaded, variables)
    assert record.network == {"name": "resnet8", "width": 0.25}
    assert (record.channels, record.finished, record.categories[6]) == (3, True, "category 6")
    report = json.loads((tmp_path / "teacher" / "import.json").read_text())
    assert report["used"]["layer2.0.downsample.1.running_var"] == "batch_stats/stage2_block1/downsample/var"
    assert "branch4.weight" in report["unused"]


def test_paths_are_shown_as_one_printable_line(arrays, tmp_path, capsys):
    file, out = tmp_path / "a\n\x1b[2Jb.safetensors", tmp_path / "c\n\x1b[2Jd"
    safetensors.numpy.save_file(arrays, file)
    assert run(file, out) == 0
    assert export.main(["export", str(out), f"--out={out / 'e'}", "--size=8,8", "--mean=0", "--std=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)


def test_counters_of_batches_are_named(arrays, tmp_path, capsys):
    safetensors.numpy.save_file(arrays, tmp_path / "weights.safetensors")
    assert run(tmp_path / "weights.safetensors", tmp_path / "teacher") == 0
    expected = "0 missing, 9 not needed, all of them num_batches_tracked, PyTorch's counters of batches (listed in "
    assert expected in capsys.readouterr().out


def canary(path):
    """Arguments of a call that leaves a file, in any shell."""
    return (f"touch {path}",)


def _content(make, write=write_zip):
    """Writes what `make` makes of tensors and canary, beside sound storages."""

    def write_file(path, arrays, canary_path):
        tensors, storages = torch_files.state_dict(arrays)
        write(path, make(tensors, canary_path), storages)

    return write_file


def _bytes(make):
    return lambda path, arrays, canary_path: path.write_bytes(make(canary_path))


def _changed(change):
    def write_file(path, arrays, _):
        tensors, storages = torch_files.state_dict(arrays)
        write_zip(path, tensors, storages)
        change(path)

    return write_file


def _with(name, **settings):
    """The sound tensors, one of them with another description."""

    def make(tensors, _):
        number = str(list(tensors).index(name))
        return tensors | {name: torch_files.tensor(number, np.ones(7, np.float32), **settings)}

    return make


def system(canary_path):
    return Call(Global("posix", "system"), canary(canary_path))


def evaluate(canary_path):
    return Call(Global("builtins", "eval"), (f"open({str(canary_path)!r}, 'w').close()",))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-3000])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[data.index(b"archive/data/0") + 20] ^= 1
    path.write_bytes(data)


def _zip_bomb(path, arrays, _):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))


def _overlapping_zip(path, arrays, _):
    """Many members that are all the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", bytes(1_000_000))
        archive.filelist += [archive.filelist[0]] * 1000


def _tar(path, *_):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())


def _safetensors(header, data=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _itself(tensors, _):
    """A network that is a part of itself: remembered as 0, then put into its parts."""
    return Raw(b"cresnet\nNet\n)\x81q\x00}X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00ah\x00ssb")


def _copies(module, name, values):
    """One list, again and again given to a function that copies it."""
    many = operations(Global(module, name)) + b"q\x01" + operations(values) + b"\x85q\x02" + 300 * b"h\x01h\x02R"
    return _content(lambda *_: Raw(b"(" + many + b"t"))


def _many_names(tensors, _):
    """300 texts, each with each as the name of a class."""
    texts = [b"\x8c\x0a%010d" % number + b"r" + struct.pack("<I", number) for number in range(300)]
    known = [b"j" + struct.pack("<I", number) for number in range(300)]
    return Raw(b"(" + b"".join(texts) + b"".join(one + other + b"\x93" for one in known for other in known) + b"t")


STORAGE = Outside(("storage", Global("torch", "FloatStorage"), "0", "cpu", 7))


def _nested(tensors, _):
    return Raw(b"}N" + 200_000 * b"\x85" + b"Ns")


def _renamed(tensors, _):
    return {name.replace("layer", "stage"): value for name, value in tensors.items()}


def _repeated(count):
    return torch_files.tensor("0", np.ones(1, np.float32), shape=(count,), strides=(0,))


def _vgg(path, *_):
    module = create_model("vgg8", num_classes=7, width=0.0625)
    safetensors.numpy.save_file(to_torch(module, random_variables(module), 1), path)


# name -> (function of (path, arrays, canary) that writes the file, words of the message)
BAD_FILES = {
    "os.system": (_content(lambda t, c: {"net": t, "x": system(c)}), ["tries to call posix.system"]),
    "os.system, old format": (_content(lambda t, c: {**t, "x": system(c)}, write_pickles), ["posix.system"]),
    "a pickle alone": (_bytes(lambda c: pickled(system(c))), ["posix.system"]),
    "eval in a state": (
        _content(lambda t, c: Instance(Global("resnet", "Net"), {"x": evaluate(c)})),
        ["tries to call builtins.eval"],
    ),
    "call by INST": (_bytes(lambda c: b"\x80\x02(S'touch %s'\niposix\nsystem\n." % str(c).encode()), ["posix.system"]),
    "call by OBJ": (_bytes(lambda c: b"\x80\x02(cposix\nsystem\nS'touch %s'\no." % str(c).encode()), ["posix.system"]),
    "call through getattr": (
        _content(lambda t, c: Call(Call(Global("builtins", "getattr"), (Global("os", "x"), "system")), canary(c))),
        ["builtins.getattr"],
    ),
    "dotted name": (
        _bytes(lambda c: b"\x80\x04\x8c\x05torch\x8c\x0a_C.os.exec\x93(\x8c\x01atR."),
        ["torch._C.os.exec"],
    ),
    "call by a class that is known": (
        _content(lambda t, c: Call(Global("torch.nn", "Module"), canary(c))),
        ["torch.nn.Module"],
    ),
    "defaults for an allowed function": (
        _content(lambda t, c: {**t, "x": Raw(b"ctorch._utils\n_rebuild_parameter\nN}U\x0c__defaults__)s\x86b")}),
        ["no valid pickle", "__defaults__"],
    ),
    "state for a tensor": (
        _content(
            lambda t, c: {**t, "fc.bias": Raw(operations(t["fc.bias"]) + operations([None, -1000, (7,), (1,)]) + b"b")}
        ),
        ["no valid pickle"],
    ),
    "tensor beyond its storage": (_content(_with("fc.bias", offset=4)), ["fc.bias", "does not fit in the 28 bytes"]),
    "tensor before its storage": (_content(_with("fc.bias", offset=-1)), ["invalid sizes"]),
    "storage beyond the file": (
        _content(_with("fc.bias", shape=(10**12,), strides=(1,))),
        ["fc.bias", "does not fit in the 28 bytes"],
    ),
    "same value a million million times": (
        _content(_with("fc.bias", shape=(10**12,), strides=(0,))),
        ["fc.bias", "does not fit in the 28 bytes"],
    ),
    "same value in many tensors": (
        _content(lambda t, _: {f"x{n}": _repeated(10**6) for n in range(17)}),
        ["x16", "does not fit in the 16 bytes"],
    ),
    "empty, but for a huge axis": (
        _content(_with("fc.bias", shape=(2**62, 0, 2**62), strides=(1, 1, 1))),
        ["fc.bias", "is too large"],
    ),
    "names that look the same": (
        _content(lambda t, _: {**t, "a\n": t["fc.bias"], "a\\n": t["fc.bias"]}),
        ["names differ only in characters that cannot be shown"],
    ),
    "head of one class": (
        lambda path, arrays, c: write_zip(
            path, *torch_files.state_dict(arrays | {"fc.weight": np.ones((1, 16), "f4"), "fc.bias": np.ones(1, "f4")})
        ),
        ["fc.bias (1,) instead of (7,)", "nearest known network is --model=resnet8 --width=0.25:"],
    ),
    "network within itself": (_content(_itself), ["more than 20000 modules"]),
    "deeply nested": (_content(_nested), ["too much memory"]),
    "copies by Size": (_copies("torch", "Size", list(range(5000))), ["too much memory"]),
    "copies by set": (_copies("builtins", "set", list(range(5000))), ["too much memory"]),
    "copies by OrderedDict": (_copies("collections", "OrderedDict", [[n, n] for n in range(5000)]), ["too much"]),
    "copies of a shape": (
        _content(
            lambda t, _: [
                Raw(operations(list(range(5000))) + b"q\x01"),
                *[Call(Global("torch._utils", "_rebuild_tensor"), (STORAGE, 0, Raw(b"h\x01"), ())) for _ in range(100)],
            ]
        ),
        ["too much memory"],
    ),
    "many names": (_content(_many_names), ["too much memory"]),
    "room for a thousand million objects": (_bytes(lambda c: b"\x80\x02Nr\xff\xff\xff\x3f."), ["too much memory"]),
    "text of a declared size": (
        _bytes(lambda c: b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"a."),
        ["no valid pickle"],
    ),
    "zip bomb": (_zip_bomb, ["unpacks to more than its own size"]),
    "overlapping zip": (_overlapping_zip, ["unpacks to more than its own size"]),
    "truncated": (_changed(_truncate), ["damaged archive"]),
    "flipped bit": (_changed(_flip), ["damaged archive", "CRC"]),
    "truncated, old format": (
        lambda path, arrays, c: (_content(lambda t, c: t, write_pickles)(path, arrays, c), _truncate(path)),
        ["in the middle of storage"],
    ),
    "no storage": (
        lambda path, arrays, c: write_zip(path, torch_files.state_dict(arrays)[0], {}),
        ["data/", "is missing"],
    ),
    "TorchScript": (lambda path, arrays, c: write_zip(path, {}, {}, **{"constants.pkl": b""}), ["TorchScript"]),
    "another zip": (lambda path, arrays, c: zipfile.ZipFile(path, "w").close() or _add(path), ["without data.pkl"]),
    "tar": (_tar, ["neither an archive nor a pickle"]),
    "text": (_bytes(lambda c: b"import os\n"), ["neither an archive nor a pickle"]),
    "picture": (_bytes(lambda c: b"\x89PNG\r\n\x1a\n" + bytes(100)), ["neither an archive nor a pickle"]),
    "empty": (_bytes(lambda c: b""), ["neither an archive nor a pickle"]),
    "some other pickle": (_bytes(lambda c: pickled({"a": 1})), ["torch.save did not write"]),
    "no tensors": (_content(lambda t, c: {"epoch": 3}), ["not the tensors of a network", "epoch"]),
    "several networks": (_content(lambda t, c: {"model": t, "ema": t}), ["--key", "model, ema"]),
    "renamed tensors": (
        _content(_renamed),
        ["missing: ", "unknown: stage1", "stage1.0.conv1.weight may be layer1.0.conv1.weight", "shapes are those of"],
    ),
    "safetensors that are none": (_bytes(lambda c: b"\xff" * 100), ["safetensors"]),
    "safetensors beyond the file": (
        _bytes(lambda c: _safetensors({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})),
        ["safetensors"],
    ),
    "another network": (_vgg, ["missing: ", "unknown: ", "those of --model=vgg8 --width=0.0625 --num_classes=7"]),
    "unknown type": (
        _bytes(lambda c: _safetensors({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1))),
        ["x has type F4", "BF16"],
    ),
}


def test_one_state_of_many_objects_is_not_copied():
    state = operations({str(number): number for number in range(20_000)})
    for kind in (operations(Global("resnet", "Net")) + b")\x81", operations(Call(torch_files.ORDERED, ()))):
        file = io.BytesIO(pickled(Raw(b"(" + state + b"q\x01" + 200 * (kind + b"h\x01b") + b"t")))
        tracemalloc.start()
        content, _ = unpickle.load(file)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(content) == 201
        assert peak < 50e6, "each copy takes 0.6 MB"


def _add(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case, arrays, tmp_path, capsys):
    write, words = BAD_FILES[case]
    safe = "safetensors" in case or write is _vgg or case == "unknown type"
    file, canary_path = tmp_path / ("file.safetensors" if safe else "file.pth"), tmp_path / "canary"
    write(file, arrays, canary_path)
    assert run(file, tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert all(line.startswith("looking for the nearest known network ") for line in printed.out.splitlines())
    (line,) = printed.err.splitlines()
    assert line.startswith(f"error: {file}"), line
    for word in words:
        assert word in line
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name], "something was executed or written"


def test_the_canary_sings(tmp_path):
    # What the hostile files ask for leaves a file where it is executed.
    for number, call in enumerate((system, evaluate)):
        pickle.loads(pickled(call(tmp_path / str(number))))
        assert (tmp_path / str(number)).exists()


# arguments after those of `run`, words of the message
BAD_ARGUMENTS = {
    "unknown model": (["--model=resnet19"], ["unknown network 'resnet19'", "did you mean resnet18"]),
    "width": (["--width=many"], ["--width", "'many'", "0.001 to 64"]),
    "classes": (["--num_classes=8"], ["fc.bias (7,) instead of (8,)", "8 classes", "--num_classes=7"]),
    "channels": (
        ["--channels=1"],
        ["conv1.weight (4, 3, 3, 3) instead of (4, 1, 3, 3)", "those of --model=resnet8 --width=0.25 --num_classes=7"],
    ),
    "prefix": (["--prefix=head."], ["no tensor has a name that begins with head.; names begin with layer1, layer2"]),
    "prefix of a wrapper": (["--prefix=student."], ["no tensor has a name that begins with student."]),
    "names without effect": (["--names={full}/unused"], ["unused has no rule that changes a name of", "leave it out"]),
    "no names file": (["--names={full}/none"], ["none", "No such file"]),
    "names": (["--names={full}/two"], ["two, line 1: 'cat' is not a pattern and a replacement"]),
    "size": (["--size=8"], ["--size has 1 values; it must have 2"]),
    "mean alone": (["--mean=0.5"], ["give both --mean and --std, or neither"]),
    "mean of other channels": (["--mean=0.5,0.5", "--std=1"], ["--mean has 2 values, but the images have 3 channels"]),
    "verification without mean": (["--verify=digits"], ["--verify=digits needs --mean and --std"]),
    "width without channels": (["--width=0.001"], ["width 0.001 leaves"]),
    "key": (["--key=ema"], ["no network under the key ema", "none"]),
    "unknown argument": (["--classes=7"], ["unknown flag --classes; did you mean --num_classes?"]),
    "out exists": (["--out={full}"], ["already exists"]),
    "no categories file": (["--categories={full}/none"], ["none", "No such file"]),
    "a category with NUL": (["--categories={full}/nul"], ["nul, line 2: a name has at most 10,000 characters"]),
    "a long category": (["--categories={full}/long"], ["long, line 1: a name has at most 10,000 characters"]),
    "number of categories": (["--categories={full}/two"], ["2 names", "must hold 7"]),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case, arrays, tmp_path, capsys):
    arguments, words = BAD_ARGUMENTS[case]
    file = write_zip(tmp_path / "file.pth", *torch_files.state_dict(arrays))
    full = tmp_path / "full"
    full.mkdir()
    (full / "two").write_text("cat\ndog\n")
    (full / "nul").write_text("0\n1\0\n2\n3\n4\n5\n6\n")
    (full / "long").write_text("0" * 20_000 + "\n1\n2\n3\n4\n5\n6\n")
    (full / "unused").write_text("^backbone[.] -\n")
    base = {"--model": "resnet8", "--width": "0.25", "--num_classes": "7", "--out": str(tmp_path / "out")}
    base |= dict(argument.format(full=full).split("=") for argument in arguments)
    assert main(["import_torch", str(file), *(f"{name}={value}" for name, value in base.items())]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


def test_categories_of_a_file_that_begins_with_a_byte_order_mark(arrays, tmp_path):
    file = write_zip(tmp_path / "file.pth", *torch_files.state_dict(arrays))
    (tmp_path / "names").write_text("0\n1\n2\n3\n4\n5\n6\n", encoding="utf-8-sig")
    assert run(file, tmp_path / "out", f"--categories={tmp_path / 'names'}") == 0
    assert load_variables(str(tmp_path / "out")).record.categories == list("0123456")


def test_rules_of_a_file_that_begins_with_a_byte_order_mark(tmp_path):
    (tmp_path / "rules").write_text("^backbone[.] net.\n", encoding="utf-8-sig")
    (rule,) = read_rules(tmp_path / "rules")
    assert rename(["backbone.conv1"], [rule]) == {"net.conv1": "backbone.conv1"}


def test_an_import_into_the_folder_of_another_one(arrays, tmp_path, capsys, monkeypatch):
    """The other one has begun after this one has looked whether the folder is new."""
    file, out = write_zip(tmp_path / "file.pth", *torch_files.state_dict(arrays)), tmp_path / "out"
    assert run(file, out) == 0
    before = sorted(out.rglob("*"))
    monkeypatch.setattr(import_torch, "check_new", lambda folder: None)
    assert run(file, out) == 2
    assert "was written by another import; name a new or empty folder" in capsys.readouterr().err
    monkeypatch.setattr(lock, "LOCAL_PATIENCE_SECONDS", 0)
    with lock.locked(out / "lock", "a test"):
        assert run(file, out) == 2
    assert "another import into" in capsys.readouterr().err
    assert sorted(out.rglob("*")) == before


def test_what_a_network_does_not_need_is_left_out(arrays, tmp_path, capsys):
    """As the message advises, if there is nothing else wrong."""
    tensors = arrays | {"aux head.weight": np.ones(3, np.float32), "x+y": np.ones(3, np.complex64)}
    file, names = tmp_path / "file.safetensors", tmp_path / "names"
    safetensors.numpy.save_file(tensors, file)
    lines = []
    while run(file, tmp_path / "out", *([f"--names={names}"] if lines else [])):
        line = capsys.readouterr().err
        assert "unknown: " in line
        lines.append(line.partition("a line such as '")[2].partition("' for each")[0])
        names.write_text("\n".join(lines))
        assert len(lines) <= 2
    assert {"aux head.weight", "x+y"} <= set(json.loads((tmp_path / "out" / "import.json").read_text())["unused"])


def test_a_known_checkpoint_of_another_model(arrays, tmp_path, capsys, monkeypatch):
    file = write_zip(tmp_path / "file.pth", *torch_files.state_dict(arrays))
    known = types.SimpleNamespace(model="resnet20")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(checkpoints, "known_checkpoints", lambda: {digest: known})
    assert run(file, tmp_path / "out") == 2
    assert "file.pth holds a resnet20, as it is a known checkpoint: leave out --model" in capsys.readouterr().err


@pytest.mark.slow
def test_verification_on_images_of_another_size(tmp_path, capsys):
    module = create_model("deit_tiny", num_classes=10, settings={"depth": 1})
    file = tmp_path / "vit.safetensors"
    safetensors.numpy.save_file(to_torch(module, random_variables(module), batches=0), file)
    for number in range(10):
        for split in ("train", "test"):
            (tmp_path / "images" / split / str(number)).mkdir(parents=True)
            for count, side in enumerate((50, 60)):
                Image.new("RGB", (side, 48)).save(tmp_path / "images" / split / str(number) / f"{count}.png")
    arguments = ["--model=deit_tiny", "--num_classes=10", "--mean=0.5", "--std=0.5", "--verify=image_folder"]
    arguments = ["import_torch", str(file), *arguments, f"--path={tmp_path / 'images'}"]
    assert main([*arguments, f"--out={tmp_path / 'a'}", "--size=24,24"]) == 2
    assert "vit.safetensors does not work with images of shape (24, 24, 3)" in capsys.readouterr().err
    assert main([*arguments, f"--out={tmp_path / 'a'}", "--size=32,32"]) == 0
    assert "image_folder, 20 test images: top-1" in capsys.readouterr().out


def test_network_must_be_named_or_known(arrays, tmp_path, capsys):
    file = write_zip(tmp_path / "file.pth", *torch_files.state_dict(arrays))
    assert main(["import_torch", str(file), f"--out={tmp_path / 'out'}"]) == 2
    assert "is not a known checkpoint: give --model and --num_classes" in capsys.readouterr().err


def test_missing_file(tmp_path, capsys):
    assert run(tmp_path / "none.pth", tmp_path / "out") == 2
    assert "No such file" in capsys.readouterr().err
