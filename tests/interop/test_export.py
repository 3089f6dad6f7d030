"""A trained network leaves as a state dict of PyTorch and as a function that needs jax alone, and comes back."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from cskd_jax.data import load_dataset
from cskd_jax.data.augment import Normalize
from cskd_jax.errors import UserError
from cskd_jax.interop import export, import_torch
from cskd_jax.models import create_model
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.runs.trained import check_fits, load_given_teachers
from cskd_jax.training.checkpoint import load_variables
from tests.torch_files import assert_same_variables

TEACHER = ["--model=resnet8", "--width=0.25", "--num_classes=10", "--channels=1"]


@pytest.fixture(scope="module")
def exported(done, tmp_path_factory):
    """What export writes of the student of a finished run."""
    out = tmp_path_factory.mktemp("exported") / "out"
    assert export.main(["export", str(done), f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def returned(done, tmp_path_factory):
    """The teacher of a finished run, sent out and back in."""
    out = tmp_path_factory.mktemp("returned")
    assert export.main(["export", str(done), "--network=teacher", f"--out={out / 'out'}"]) == 0
    weights = out / "out" / "weights.safetensors"
    assert import_torch.main(["import_torch", str(weights), *TEACHER, f"--out={out / 'in'}"]) == 0
    return out / "in"


@pytest.mark.slow
def test_description(exported):
    description = json.loads((exported / "network.json").read_text())
    assert (description["name"], description["width"], description["step"]) == ("resnet8", 0.25, 9)
    assert description["finished"] is True
    assert description["categories"] == [str(digit) for digit in range(10)]
    assert description["images"] == {"size": [8, 8], "mean": [0.3055], "std": [0.3766]}
    weights = safetensors.numpy.load_file(exported / "weights.safetensors")
    assert int(weights["layer3.0.bn2.num_batches_tracked"]) == 9


@pytest.mark.slow
def test_function_runs_with_jax_alone(exported, done, tmp_path):
    variables, *_ = load_variables(str(done / "student"))
    module = create_model("resnet8", num_classes=10, width=0.25)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    normalized = Normalize((0.3055,), (0.3766,))(images)
    expected = jax.jit(lambda v, x: module.apply(v, x, train=False).logits)(variables, normalized)
    np.savez(tmp_path / "case.npz", images=images, logits=expected)
    program = f"""
import sys, jax, numpy as np
case = np.load({str(tmp_path / "case.npz")!r})
network = jax.export.deserialize(bytearray(open({str(exported / "network.jax_export")!r}, "rb").read()))
for size in (1, 5):
    logits = network.call(case["images"][:size])
    assert logits.shape == (size, 10)
    np.testing.assert_allclose(logits, case["logits"][:size], rtol=1e-5, atol=1e-5)
assert not {{"cskd_jax", "flax", "optax", "orbax"}} & set(sys.modules)
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.slow
def test_out_and_in_is_the_identity(returned, done):
    assert_same_variables(load_variables(str(returned))[0], load_variables(str(done / "teacher"))[0])


@pytest.mark.slow
def test_imported_teacher_is_taken(returned, digits_dir):
    config = load_recipe("digits:kd", [])
    config.teacher.update(checkpoint=str(returned), name="resnet8", width=0.25)
    ((_, path, saved),) = load_given_teachers(config)
    dataset = load_dataset("digits", data_dir=str(digits_dir))
    # Ten categories, whatever their names, of images that it does not know.
    assert check_fits(path, saved, dataset) is None
    fewer = dataclasses.replace(dataset, categories=dataset.categories[:9])
    with pytest.raises(UserError, match="has 10 classes, but digits has 9"):
        check_fits(path, saved, fewer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{done}", "--out={done}"], ["already exists"]),
        (["{done}/none", "--out={out}"], ["no checkpoint in"]),
        (["{done}", "--network=assistant", "--out={out}"], ["--network", "assistant", "student"]),
        (["{done}/student", "--network=teacher", "--out={out}"], ["holds one network", "leave out --network"]),
        (["{half}", "--out={out}"], ["no checkpoint in", "half/student"]),
        (["{done}", "--mean=0.5", "--out={out}"], ["already describes its training images", "leave out --mean"]),
        (["{returned}", "--out={out}"], ["does not describe its training images", "--size"]),
        (["{returned}", "--out={out}", "--size=8,8", "--mean=0.3,0.3", "--std=1"], ["--mean has 2 values", "1"]),
        (["{returned}", "--out={out}", "--size=8,x", "--mean=0.3", "--std=1"], ["--size", "'x'"]),
    ],
)
def test_bad_arguments(arguments, words, done, returned, tmp_path, capsys):
    out, half = tmp_path / "out", tmp_path / "half"
    half.mkdir()
    (half / "teacher").symlink_to(done / "teacher")  # a run that has not come to its student
    names = {"done": done, "returned": returned, "half": half, "out": out}
    assert export.main(["export", *(text.format(**names) for text in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    assert not out.exists()
