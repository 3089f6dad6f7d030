"""Bad input of the evaluation; what it measures is in test_sweep.py, on networks that were trained there."""

import json

import pytest

from cskd_jax.evaluate.__main__ import main
from tests.conftest import ROOT

CONFIG = f"--config={ROOT}/configs/digits.py"

BAD_INPUT = {
    "nothing": ([], ["name one folder, such as cskd-jax evaluate runs/digits/kd-seed0; got none"]),
    "both": (["--workdir={done}", "--checkpoint={done}/student"], ["name one folder", "{done} and {done}/student"]),
    "no folder": (["--workdir={done}/nothing"], ["is not a folder"]),
    "no run": (["--workdir={empty}"], ["holds no checkpoints of a teacher or a student"]),
    "no configuration beside it": (
        ["--checkpoint={empty}"],
        ["{empty} belongs to no run: there is no config.json in {parent}; name the recipe with --config=RECIPE"],
    ),
    "a run for a network": (["--checkpoint={done}/tensorboard"], ["no checkpoint in"]),
    "a workdir for a network": (
        ["--checkpoint={done}", CONFIG, "--config.dataset.data_dir={data}"],
        ["no checkpoint in {done}/checkpoints"],
    ),
    "unknown key": (["--workdir={done}", "--config.batchsize=3"], ["did you mean batch_size"]),
    "a run as a word": (["{done}", "--config.batchsize=3"], ["did you mean batch_size"]),
    "a network as a word": (["{done}/student", "--config.batchsize=3"], ["did you mean batch_size"]),
    "batch and devices": (["--workdir={done}", "--config.batch_size=60"], ["batch_size is 60", "8 devices"]),
    "other labels": (["--workdir={done}", "--config.dataset.name=digit_pairs"], ["one class per image"]),
    "other program's flag": (["--workdir={done}", "--jobs=3"], ["jobs"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, done, digits_dir, tmp_path, capsys):
    arguments, words = BAD_INPUT[case]
    assert main(["evaluate", *(a.format(done=done, data=digits_dir, empty=tmp_path) for a in arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for word in words:
        assert word.format(done=done, empty=tmp_path, parent=tmp_path.parent) in line
    assert not (done / "evaluation.json").exists()


def test_damaged_configuration(tmp_path, capsys):
    (tmp_path / "student" / "checkpoints").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps({"batch_size": 3, "bach": 4}))
    assert main(["evaluate", f"--workdir={tmp_path}"]) == 2
    assert "unknown configuration key bach" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "example"),
    [("cifar100", "--config=RECIPE, such as --config=cifar100"), (None, "--config=RECIPE"), ("x\n", "--config=RECIPE")],
)
def test_an_imported_network_needs_a_recipe(dataset, example, tmp_path, capsys):
    folder = tmp_path / "teacher56"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "import.json").write_text(json.dumps({"file": "a.pth", "sha256": "0", "dataset": dataset}))
    assert main(["evaluate", str(folder)]) == 2
    expected = f"{folder} holds an imported network (import.json), not a run: name the recipe with {example}"
    assert capsys.readouterr().err == f"error: {expected}\n"
