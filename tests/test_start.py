"""Students that start from the weights of a trained network."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from cskd_jax.errors import UserError
from cskd_jax.main import main
from cskd_jax.runs import trained
from cskd_jax.runs.build import describe_network, load_data, make_network
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.runs.trained import Given, load_start, starting_variables
from cskd_jax.training.checkpoint import load_variables
from cskd_jax.training.saved import Record, Saved
from tests.torch_files import assert_same_variables


@pytest.fixture(scope="module")
def begun(done, digits_dir):
    """Configuration, data, network and checkpoint of a student that starts from that of the finished run."""
    overrides = [f"--config.student.checkpoint={done}", f"--config.dataset.data_dir={digits_dir}"]
    overrides += ["--config.student.name=resnet8", "--config.student.width=0.25"]
    config = load_recipe("digits:ce", overrides)
    dataset = load_data(config)
    network = make_network(describe_network(config.student, dataset.image_shape), dataset.num_classes, "float32")
    return config, dataset, network, load_start(config)


@pytest.mark.slow
def test_same_classes(begun, done):
    _, dataset, network, start = begun
    variables, is_new = starting_variables(start, network, dataset, seed=0)
    assert not is_new
    assert start.path == str(done / "student")
    assert_same_variables(variables, load_variables(str(done / "student")).variables)


@pytest.mark.slow
def test_other_classes(begun):
    _, dataset, _, start = begun
    dataset = dataclasses.replace(dataset, categories=("even", "odd"))
    network = make_network({"name": "resnet8", "width": 0.25}, 2, "float32")
    variables, is_new = starting_variables(start, network, dataset, seed=0)
    assert is_new
    assert variables["params"]["classifier"]["bias"].shape == (2,)
    kept, saved = (
        {k: v for k, v in x["params"].items() if k != "classifier"} for x in (variables, start.saved.variables)
    )
    assert_same_variables({"params": kept}, {"params": saved})
    again, other = (starting_variables(start, network, dataset, seed)[0] for seed in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, variables, again)
    kernels = (x["params"]["classifier"]["kernel"] for x in (variables, other))
    assert np.any(np.subtract(*kernels))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "student.name=resnet14",
            "holds {'name': 'resnet8', 'width': 0.25}, but the configuration specifies {'name': 'resnet14'",
        ),
        ("student.width=0.5", "the configuration specifies {'name': 'resnet8', 'width': 0.5}"),
        ("student.checkpoint=nothing", "no checkpoint in"),
    ],
)
def test_another_network(begun, override, message):
    key, _, value = override.partition("=")
    config = begun[0].copy_and_resolve_references()
    config.update_from_flattened_dict({key: float(value) if "width" in key else value})
    with pytest.raises(UserError) as error:
        load_start(config)
    assert message in str(error.value)


@pytest.mark.slow
def test_a_run_goes_on_from_there(small_run, done, start, tmp_path, capsys):
    arguments = [f"{small_run[0]}:ce", *small_run[1:], f"--config.student.checkpoint={done}", "--config.epochs=1"]
    workdir = f"--workdir={tmp_path / 'run'}"
    output, error = (process := start([*arguments, "--config.optimizer.learning_rate=1e-9", workdir])).communicate()
    assert process.returncode == 0, error
    assert f"student: starts from {done / 'student'}\n" in output
    # At such a rate the weights stay, and batch statistics move a little.
    results = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "run", done))
    ours, theirs = (found["student"]["last"]["top1"] for found in results)
    assert abs(ours - theirs) < 0.1
    assert "student.checkpoint digest" in json.loads((tmp_path / "run" / "config.json").read_text())
    # From another network it would be another run.
    other = [a.replace(f"checkpoint={done}", f"checkpoint={done}/teacher") for a in arguments]
    assert main(["main", *other, "--config.optimizer.learning_rate=1e-9", "--config.epochs=2", workdir]) == 2
    assert "student.checkpoint digest" in capsys.readouterr().err


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_settings_that_shapes_do_not_show(role, monkeypatch):
    """With another number of heads, the same arrays are another network."""
    record = Record({"name": "deit_tiny", "width": 1.0, "settings": {"num_heads": 6}}, channels=3, finished=True)
    monkeypatch.setattr(trained, "_load_at", lambda key, path, *_: Given(key, path, Saved({}, record, 1, "digest")))
    config = load_recipe(
        "cifar100:kd", [f"--config.{role}.{key}" for key in ("checkpoint=given", "name=deit_tiny", "width=1")]
    )
    remedy = {"student": "set it to 6", "teacher": "leave it at None"}[role]
    load = {"student": load_start, "teacher": lambda config: trained._load_teacher(config, 0)}[role]
    if role == "teacher":
        config.teacher.num_heads = 3
    with pytest.raises(UserError) as error:
        load(config)
    sets = f"but the configuration specifies 3 for {role}.num_heads: {remedy}"
    assert str(error.value) == f"{role}.checkpoint given holds a deit_tiny with num_heads 6, {sets}"
    config[role].num_heads = 6
    assert load(config).path == "given"
