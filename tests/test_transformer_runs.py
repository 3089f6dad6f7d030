"""Vision Transformers in configurations, imports, exports and whole runs."""

import json

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy

import cskd_jax
from cskd_jax.errors import UserError
from cskd_jax.interop import export, import_torch, nearest
from cskd_jax.interop.names import to_torch
from cskd_jax.models import MODELS, create_model
from cskd_jax.runs import schema
from cskd_jax.runs.build import describe_network
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.training.checkpoint import load_variables
from tests.torch_files import assert_same_variables, random_variables

SETTINGS = {"patch_size": 4, "image_size": (16, 16), "depth": 2, "register_tokens": 1, "layer_scale": 1e-5}
STUDENT = ["--config.student.name=deit_tiny", "--config.student.patch_size=2", "--config.student.depth=2"]


@pytest.fixture
def tensors(tmp_path):
    """A file of a Vision Transformer, and its variables."""
    module = create_model("deit_tiny", num_classes=7, width=0.25, settings=SETTINGS)
    variables, file = random_variables(module), tmp_path / "vit.safetensors"
    safetensors.numpy.save_file(to_torch(module, variables, batches=1), file)
    return file, variables


def test_keys_of_a_configuration():
    config = load_recipe("digits:kd", [*STUDENT, "--config.student.stochastic_depth=0.1"])
    schema.validate(config)
    assert describe_network(config.student, (8, 8, 1)) == {
        "name": "deit_tiny",
        "width": 0.125,
        "settings": {"patch_size": 2, "depth": 2, "stochastic_depth": 0.1, "image_size": (8, 8)},
    }
    assert describe_network(config.teacher, (8, 8, 1)) == {"name": "resnet18", "width": 0.25}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.patch_size=2", "teacher.patch_size is 2; resnet18 has no such setting, nor any other"),
        ("student.patch_size=0", "student.patch_size is 0; it must be an integer from 1 to 1024, or None"),
        ("student.pool=max", "student.pool is 'max'; it must be one of token, average, or None"),
        ("student.dropout=1", r"student.dropout is 1.0; it must be a number in \[0, 1\), or None"),
    ],
)
def test_wrong_keys(override, message):
    with pytest.raises(UserError, match=message):
        schema.validate(load_recipe("digits:kd", [*STUDENT, f"--config.{override}"]))


def test_import_reads_the_settings(tensors, tmp_path, capsys):
    file, variables = tensors
    arguments = [str(file), "--model=deit_tiny", "--width=0.25", "--num_classes=7", f"--out={tmp_path / 'out'}"]
    assert import_torch.main(["import_torch", *arguments, "--num_heads=4"]) == 0, capsys.readouterr().err
    saved = load_variables(str(tmp_path / "out"))
    assert_same_variables(saved.variables, variables)
    network = saved.record.packaged_network()
    assert network["settings"] == SETTINGS | {"num_heads": 4}
    assert create_model(**network, num_classes=saved.num_classes).token_size == 48


def test_nearest_network(tensors, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nearest, "MODELS", {name: MODELS[name] for name in ("resnet8", "deit_tiny", "deit_small")})
    arguments = [str(tensors[0]), "--model=resnet8", "--num_classes=7", f"--out={tmp_path / 'out'}"]
    assert import_torch.main(["import_torch", *arguments]) == 2
    error = capsys.readouterr().err
    assert "--model=deit_tiny --width=0.25 --num_classes=7" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=deit_tiny", "--num_classes=1"], "--num_classes is 1; it must be at least 2, or 0 for a network"),
        (["--model=resnet8", "--num_classes=0"], "resnet8 needs a number of classes"),
        (["--model=resnet8", "--num_classes=7", "--num_heads=2"], "num_heads is 2; resnet8 has no such setting"),
    ],
)
def test_bad_flags(flags, message, tensors, tmp_path, capsys):
    assert import_torch.main(["import_torch", str(tensors[0]), *flags, f"--out={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.slow
def test_run_on_the_command_line(start, small_run, done, tmp_path, capsys):
    """A run with a teacher of maps and a student of tokens, its export, and the import of that."""
    vit = [*STUDENT, "--config.student.width=0.125", "--config.epochs=1", f"--config.teacher.checkpoint={done}/teacher"]
    arguments = [f"{small_run[0]}:at+kd", *small_run[1:], *vit, f"--workdir={tmp_path / 'run'}"]
    _, error = (process := start(arguments)).communicate()
    # The teacher has three stages, and two blocks make two.
    assert process.returncode == 2
    assert "student has 2 stages and teacher 3: stages are paired one to one" in error

    arguments = [*arguments[:-1], "--config.student.depth=3", arguments[-1]]
    _, error = (process := start(arguments)).communicate()
    assert process.returncode == 0, error
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["student"]["model"] == "deit_tiny"
    assert export.main(["export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'exported'}"]) == 0
    file, imported = tmp_path / "exported" / "weights.safetensors", tmp_path / "imported"
    flags = ["--model=deit_tiny", "--width=0.125", "--num_classes=10", "--channels=1", f"--out={imported}"]
    assert import_torch.main(["import_torch", str(file), *flags]) == 0, capsys.readouterr().err
    saved, again = load_variables(str(tmp_path / "run" / "student")), load_variables(str(imported))
    assert_same_variables(again.variables, saved.variables)
    assert again.record.network == saved.record.network


@pytest.mark.exhaustive
@pytest.mark.slow
def test_random_draws_of_runs(tmp_path):
    """Four devices are one, and a run that goes on is one that was never interrupted."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (24, 8, 8, 3), np.uint8), rng.integers(0, 3, 24).astype(np.int32)
    settings = {"patch_size": 4, "image_size": (8, 8), "depth": 1, "dropout": 0.2, "stochastic_depth": 0.5}
    module = create_model("deit_tiny", num_classes=3, width=1 / 16, settings=settings)
    messages = []

    class Listener(cskd_jax.Callback):
        def on_message(self, message):
            messages.append(message)

    def train(epochs, devices=1, workdir=None):
        common = {"train": (images, labels), "test": (images, labels), "batch_size": 8, "mean": (0.5,), "std": (0.25,)}
        return cskd_jax.distill(
            module,
            losses={"cross_entropy": 1.0},
            optimizer=optax.adam(1e-2),
            epochs=epochs,
            devices=devices,
            workdir=workdir,
            callbacks=[Listener()],
            **common,
        ).variables

    whole = train(2)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4), train(2, devices=4), whole)
    assert not any("depend on the number of devices" in message for message in messages)
    train(1, workdir=tmp_path / "run")
    assert_same_variables(train(2, workdir=tmp_path / "run"), whole)
