"""The known public checkpoints: what is recorded about them is consistent, documented, and used by an import."""

import hashlib
import json
import re

import pytest
import safetensors.numpy

from cskd_jax.data import cifar
from cskd_jax.interop import checkpoints, export
from cskd_jax.interop.checkpoints import known_checkpoints
from cskd_jax.interop.import_torch import main
from cskd_jax.interop.names import to_torch
from cskd_jax.models import MODELS, create_model
from cskd_jax.runs.imports import read_origin
from cskd_jax.training.checkpoint import load_variables
from tests.torch_files import assert_same_variables, random_variables


def test_entries():
    known = known_checkpoints()
    assert len(known) == 14
    for digest, checkpoint in known.items():
        assert re.fullmatch("[0-9a-f]{64}", digest)
        assert checkpoint.repository.startswith("https://github.com/")
        assert checkpoint.model in MODELS
        source = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}[checkpoint.dataset]
        assert len(set(checkpoint.categories)) == source.label_sizes["label"]
        # CIFAR numbers its classes in the order of their names.
        assert checkpoint.categories == sorted(checkpoint.categories)
        assert {name: len(values) for name, values in checkpoint.images.items()} == {"size": 2, "mean": 3, "std": 3}


@pytest.fixture
def known_file(tmp_path, monkeypatch):
    """A file that is made known as one of a network for digits, and its variables."""
    module = create_model("resnet8_stem64", num_classes=10, width=1.0)
    variables, file = random_variables(module), tmp_path / "known.safetensors"
    safetensors.numpy.save_file(to_torch(module, variables, batches=1), file)
    (entry, *_) = known_checkpoints().values()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    images = {"size": [8, 8], "mean": [0.5], "std": [0.25]}
    categories = [f"digit {number}" for number in range(10)]
    entry = entry._replace(
        sha256=digest, model="resnet8_stem64", dataset="digits", categories=categories, images=images, stated=12.5
    )
    monkeypatch.setattr(checkpoints, "known_checkpoints", lambda: {digest: entry})
    return file, variables


def test_known_file_needs_no_flags(known_file, tmp_path, capsys):
    file, variables = known_file
    assert main(["import_torch", str(file), f"--out={tmp_path / 'out'}"]) == 0
    assert "which is models/cifar100_resnet20.pth of https://github.com/robtad/DANS, digits, stated accuracy 12.50" in (
        capsys.readouterr().out
    )
    loaded, record, *_ = load_variables(str(tmp_path / "out"))
    assert_same_variables(loaded, variables)
    assert record.network == {"name": "resnet8_stem64", "width": 1.0}
    assert record.categories[3] == "digit 3"
    assert record.images == {"size": [8, 8], "mean": [0.5], "std": [0.25]}
    assert read_origin(tmp_path / "out") == {
        "file": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "source": "https://github.com/robtad/DANS/blob/HEAD/models/cifar100_resnet20.pth",
        "dataset": "digits",
    }


def test_flags_precede_what_is_known(known_file, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"number {number}\n" for number in range(10)))
    flags = ["--mean=0.1", "--std=0.2", f"--categories={names}", f"--out={tmp_path / 'out'}"]
    assert main(["import_torch", str(known_file[0]), *flags]) == 0
    record = load_variables(str(tmp_path / "out")).record
    assert record.images == {"size": [8, 8], "mean": [0.1], "std": [0.2]}
    assert record.categories[3] == "number 3"


@pytest.fixture(scope="module")
def teacher_file(done, tmp_path_factory):
    """The teacher of a finished run, as a file for PyTorch."""
    out = tmp_path_factory.mktemp("teacher") / "out"
    assert export.main(["export", str(done), "--network=teacher", f"--out={out}"]) == 0
    return out / "weights.safetensors"


FLAGS = ["--model=resnet8", "--width=0.25", "--num_classes=10", "--channels=1", "--verify=digits"]


@pytest.mark.slow
def test_verified_accuracy_is_that_of_the_run(teacher_file, done, digits_dir, tmp_path, capsys):
    flags = [*FLAGS, "--mean=0.3055", "--std=0.3766", f"--data_dir={digits_dir}", f"--out={tmp_path / 'out'}"]
    assert main(["import_torch", str(teacher_file), *flags]) == 0
    expected = json.loads((done / "results.json").read_text())["teacher"]["last"]["top1"]
    assert f"test images: top-1 {expected:.4f}" in capsys.readouterr().out
    verified = json.loads((tmp_path / "out" / "import.json").read_text())["verified"]
    assert (verified["dataset"], verified["top1"]) == ("digits", expected)


@pytest.mark.slow
def test_data_that_do_not_fit_are_refused_before_anything_is_written(teacher_file, digits_dir, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"number {number}\n" for number in range(10)))
    flags = [*FLAGS, "--mean=0.3", "--std=0.4", f"--data_dir={digits_dir}", f"--out={tmp_path / 'out'}"]
    assert main(["import_torch", str(teacher_file), *flags, f"--categories={names}"]) == 2
    assert "has 10 classes (number 0, number 1, number 2, ...), but digits has 10" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
