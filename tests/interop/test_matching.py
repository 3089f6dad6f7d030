"""Tensors are found under prefixes and other names; an import that fails names the nearest network."""

import json
import pathlib
import re

import numpy as np
import pytest
import safetensors.numpy

from cskd_jax.errors import UserError
from cskd_jax.interop import export, nearest, renames
from cskd_jax.interop.import_torch import main
from cskd_jax.interop.matching import match
from cskd_jax.interop.names import to_torch
from cskd_jax.interop.renames import read_rules, rename
from cskd_jax.models import MODELS, create_model
from cskd_jax.training.checkpoint import load_variables
from tests.torch_files import MODULE, assert_same_variables, random_variables

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "interop.md"


@pytest.fixture(autouse=True)
def few_known_networks(monkeypatch):
    """The nearest network is looked for among a few, because tracing all of them takes seconds."""
    monkeypatch.setattr(nearest, "MODELS", {name: MODELS[name] for name in ("resnet8", "resnet20_option_a", "vgg8")})


def prefixed(prefix, arrays):
    return {f"{prefix}{name}": array for name, array in arrays.items()}


OTHERS = {"criterion.weight": np.ones(3, np.float32), "loss.bias": np.ones(2, np.float32)}


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "student.", "teacher.", "model.student.", "module.model."])
def test_prefix_is_found(prefix, arrays, variables):
    others = OTHERS if prefix else {}
    found = match(MODULE, 3, prefixed(prefix, arrays) | others)
    assert_same_variables(found.variables, variables)
    assert found.prefix == prefix
    assert found.used[f"{prefix}fc.bias"] == "params/classifier/bias"
    assert found.used.keys() | set(found.unused) == prefixed(prefix, arrays).keys() | others.keys()


def test_two_prefixes_fit(arrays, variables):
    doubled = {name: array if array.dtype == np.int64 else array + 1 for name, array in arrays.items()}
    both = prefixed("student.", arrays) | prefixed("teacher.", doubled)
    with pytest.raises(
        UserError, match=r"with the prefixes student\. and teacher\.: choose one, such as --prefix=student\.$"
    ):
        match(MODULE, 3, both)
    assert_same_variables(match(MODULE, 3, both, prefix="student.").variables, variables)
    bias = match(MODULE, 3, both, prefix="teacher").variables["params"]["classifier"]["bias"]
    np.testing.assert_array_equal(bias, variables["params"]["classifier"]["bias"] + 1)


def test_one_of_two_prefixes_fits(arrays, variables):
    """A teacher of another kind lies beside the student."""
    other = create_model("vgg8", num_classes=7, width=0.0625)
    both = prefixed("student.", arrays) | prefixed("teacher.", to_torch(other, random_variables(other), 1))
    found = match(MODULE, 3, both)
    assert found.prefix == "student."
    assert_same_variables(found.variables, variables)


def test_prefix_that_reading_has_removed(arrays):
    """DataParallel's module. is taken off all names when a file is read; the user may name it all the same."""
    assert match(MODULE, 3, arrays, prefix="module.").prefix == ""
    assert match(MODULE, 3, prefixed("student.", arrays), prefix="module.student.").prefix == "student."
    with pytest.raises(UserError, match=r"begins with net\.; names begin with layer1, layer2"):
        match(MODULE, 3, arrays, prefix="net.")


@pytest.mark.parametrize(
    ("model", "other"),
    [
        ("resnet8", {".downsample.": ".shortcut.", "fc.": "linear."}),
        ("resnet18_crd", {".shortcut.": ".downsample.", "linear.": "fc."}),
        ("resnet20_option_a", {"linear.": "fc."}),
        ("resnet8_stem64", {".shortcut.": ".downsample.", "linear.": "fc."}),
        ("wrn_16_1", {"block": "layer", "fc.": "linear."}),
    ],
)
def test_other_names_of_the_same_network(model, other):
    module = create_model(model, num_classes=7, width=0.25)
    variables = random_variables(module)
    arrays = to_torch(module, variables, batches=1)
    renamed = {re.sub("|".join(map(re.escape, other)), lambda m: other[m[0]], name): x for name, x in arrays.items()}
    assert renamed.keys() != arrays.keys()
    assert_same_variables(match(module, 3, renamed).variables, variables)


def test_many_prefixes_are_not_all_tried(arrays):
    wrappers = ("module", "model", "student", "teacher", "_orig_mod")
    many = {f"{first}.{second}.x": np.ones(1) for first in wrappers for second in wrappers}
    with pytest.raises(UserError, match=r"names begin with 30 prefixes of wrappers, such as .*; at most 20 are tried"):
        match(MODULE, 3, arrays | many)


def test_names_of_a_network_without_a_max_pool_do_not_fit_one_with():
    """Nothing in a file tells of a max-pool, but the code that calls a classifier `linear` has none."""
    module = create_model("resnet18_crd", num_classes=7, width=0.25)
    arrays = to_torch(module, random_variables(module), batches=1)
    with pytest.raises(UserError, match=r"missing: .*unknown: .*shortcut"):
        match(create_model("resnet18", num_classes=7, width=0.25), 3, arrays)


def test_both_names_at_once(arrays):
    with pytest.raises(UserError, match=r"fc\.bias and linear\.bias both become fc\.bias"):
        match(MODULE, 3, arrays | {"linear.bias": np.ones(7, np.float32)})


def test_rules_of_the_documentation(tmp_path, capsys):
    """The example of docs/interop.md turns the names of weiaicunzai/pytorch-cifar100 into those of resnet18_crd."""
    (example,) = re.findall(r"```text\n(# Names of.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    rules = tmp_path / "names.txt"
    rules.write_text(example)
    module = create_model("resnet18_crd", num_classes=7, width=0.0625)
    variables = random_variables(module)
    theirs = {}
    for name, array in to_torch(module, variables, batches=1).items():
        if match_ := re.fullmatch(r"layer(\d)\.(\d)\.(\w+?)(\d?)\.(.*)", name):
            stage, block, kind, number, rest = match_.groups()
            index = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4}.get(kind + number)
            place = f"shortcut.{rest}" if kind == "shortcut" else f"residual_function.{index}.{rest}"
            name = f"conv{int(stage) + 1}_x.{block}.{place}"
        else:
            name = {"conv1": "conv1.0", "bn1": "conv1.1", "linear": "fc"}[name.split(".")[0]] + name[name.index(".") :]
        theirs[name] = array
    assert {
        "conv2_x.0.residual_function.0.weight",
        "conv1.1.running_mean",
        "conv3_x.0.shortcut.1.bias",
    } <= theirs.keys()
    safetensors.numpy.save_file(theirs, tmp_path / "theirs.safetensors")
    flags = ["--model=resnet18_crd", "--width=0.0625", "--num_classes=7", f"--names={rules}"]
    assert main(["import_torch", str(tmp_path / "theirs.safetensors"), *flags, f"--out={tmp_path / 'out'}"]) == 0
    assert_same_variables(load_variables(str(tmp_path / "out"))[0], variables)
    report = json.loads((tmp_path / "out" / "import.json").read_text())
    assert report["used"]["conv2_x.0.residual_function.0.weight"] == "params/stage1_block1/conv1/kernel"


def test_rules_apply_one_after_the_other():
    rules = [("^head", "fc"), (r"fc\.(\w+)$", r"classifier.\1"), (r"^extra\.", "-")]
    assert rename(["head.bias", "extra.x", "a"], rules) == {"classifier.bias": "head.bias", "a": "a"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b c", r"line 1: 'a b c' is not a pattern and a replacement"),
        ("# fine\n\n(a b", r"line 3: .*is not a valid rule: .*unterminated"),
        (r"a \1", r"line 1: .*may refer only to the 0 groups"),
        (r"(a) \g<1>", r"may refer only to the 1 groups of the pattern, as \\1"),
        ("(a+)+ b", r"repeats a group"),
        ("a*b*c*d* x", r"more than 3 of"),
        ("a?" * 30 + "a" * 30 + " x", r"more than 8 of"),
        ("(?:a|aa)" * 40 + "[bc] x", r"more than 8 of"),
        ("(" * 5000 + ")" * 5000 + " x", r"line 1: .*is not a valid rule: .*recursion"),
        ("a{99999999999} x", r"line 1: .*is not a valid rule"),
        (r"(a) \1" + "1" * 5000, r"may refer only to the 1 groups"),
        ("a b\n" * 2000, r"more than .*1000 lines"),
        ("x" * 70_000, r"at most 65,536 are allowed"),
    ],
)
def test_bad_rules(text, message, tmp_path):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_rules(tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("rules", "name", "message"),
    [
        ([(r"(.+)", r"\1\1")] * 34, "fc.bias", r"becomes a name of 1,792 characters; at most 1,000 are allowed"),
        ([(r".*.*.*[=;]", "x")], "a" * 1000, r"the renaming rules take too long"),
    ],
)
def test_rules_that_would_take_forever(rules, name, message):
    with pytest.raises(UserError, match=message):
        rename([name], rules)


def test_rules_for_many_names_take_bounded_time(monkeypatch):
    names = [f"layer{stage}.{block}.conv{number}.weight" for stage in range(9) for block in range(9) for number in "12"]
    rules = [(r"^layer(\d+)\.(\d+)\.(conv|bn)(1|2)?\.(\w+)$", r"block\1.\2.\3\4.\5")] * 50
    assert rename(names, rules).keys() == {name.replace("layer", "block") for name in names}
    monkeypatch.setattr(renames, "_MAX_SECONDS", 0)
    with pytest.raises(UserError, match="the renaming rules take too long"):
        rename(names, rules)


def message_of(model, arrays, **settings):
    module = create_model(model, **{"num_classes": 7, "width": 0.25} | settings)
    with pytest.raises(UserError) as error:
        match(module, 3, arrays)
    return str(error.value)


def test_nearest_network(arrays):
    assert message_of("resnet8", arrays, width=0.5).endswith(
        "the tensors are those of --model=resnet8 --width=0.25 --num_classes=7"
    )
    fewer = {name: array for name, array in arrays.items() if not name.startswith("layer3.0.bn2")}
    expected = (
        r"the nearest known network is --model=resnet8 --width=0\.25 --num_classes=7: 9\d% of the tensors match it$"
    )
    assert re.search(expected, message_of("resnet8", fewer))
    renamed = {name.replace("layer", "stage").replace("conv", "kernel"): array for name, array in arrays.items()}
    message = message_of("resnet8", renamed)
    assert "stage1.0.kernel1.weight may be layer1.0.conv1.weight" in message
    assert message.endswith("the shapes are those of resnet8 under other names; --names=FILE can rename them")
    assert message_of("resnet8", renamed, width=1.0).endswith("no known network is close")
    assert message_of("resnet8", {"weight": np.ones((2, 3))}).endswith("no known network is close")


@pytest.mark.slow
def test_nearest_of_all_networks(monkeypatch, tmp_path, capsys):
    """The advice of the message is followed."""
    monkeypatch.setattr(nearest, "MODELS", MODELS)
    module = create_model("resnet34_224", num_classes=5, width=0.0625)
    variables = random_variables(module)
    file = tmp_path / "file.safetensors"
    safetensors.numpy.save_file(to_torch(module, variables, batches=1), file)
    assert main(["import_torch", str(file), "--model=resnet34", "--num_classes=1000", f"--out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    advice = "--model=resnet34_224 --width=0.0625 --num_classes=5"
    assert error.endswith(f"the tensors are those of {advice}\n")
    assert main(["import_torch", str(file), *advice.split(), f"--out={tmp_path / 'out'}"]) == 0
    assert_same_variables(load_variables(str(tmp_path / "out"))[0], variables)


def test_images_are_kept_and_completed(arrays, tmp_path, capsys):
    file, flags = tmp_path / "file.safetensors", ["--model=resnet8", "--width=0.25", "--num_classes=7"]
    safetensors.numpy.save_file(arrays, file)
    known = ["--mean=0.4,0.5,0.6", "--std=0.25"]
    assert main(["import_torch", str(file), *flags, *known, f"--out={tmp_path / 'in'}"]) == 0
    assert load_variables(str(tmp_path / "in")).record.images == {"mean": [0.4, 0.5, 0.6], "std": [0.25]}
    assert export.main(["export", str(tmp_path / "in"), f"--out={tmp_path / 'out'}"]) == 2
    assert "does not describe its training images: give --size" in capsys.readouterr().err
    assert export.main(["export", str(tmp_path / "in"), f"--out={tmp_path / 'out'}", "--size=8,8"]) == 0
    described = json.loads((tmp_path / "out" / "network.json").read_text())["images"]
    assert described == {"size": [8, 8], "mean": [0.4, 0.5, 0.6], "std": [0.25]}


def test_hostile_shapes_take_no_time(arrays):
    """A stem of a million channels, thousands of strange names, tensors without axes."""
    strange = {f"layer1.{number}.x": np.ones((4, 4, 3, 3), np.float32) for number in range(5000)}
    stem = {"conv1.weight": np.broadcast_to(np.float32(1), (10**6, 3, 3, 3)), "bn1.bias": np.float32(0)}
    assert "bn1.bias () instead of (4,)" in message_of("resnet8", arrays | strange | stem)
