"""Whose a workdir is: what may change between two starts of a run, what may not, and how a run becomes a longer one."""

import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest

from cskd_jax.data import ImageDataset, Split
from cskd_jax.errors import UserError
from cskd_jax.losses import LOSSES
from cskd_jax.runs import grid, schema, workdir
from cskd_jax.runs.recipes import load_recipe
from cskd_jax.runs.workdir import (
    DATA_FINGERPRINT,
    check_data,
    check_workdir,
    claim,
    identify,
    is_done,
    names_same_data,
    run_config,
)
from cskd_jax.training.checkpoint import Checkpoints, load_variables
from cskd_jax.training.saved import Record

EPOCHS = 30


def dataset(seed=0):
    images = np.random.default_rng(seed).integers(256, size=(8, 4, 4, 1), dtype=np.uint8)
    split = Split(images, np.arange(8, dtype=np.int32) % 2)
    return ImageDataset("digits", split, split, ("a", "b"))


def asked(word="kd", **overrides):
    """Identity of a run of digits, with overrides that have __ for a dot."""
    arguments = [f"--config.{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return identify(load_recipe(f"digits:{word}", arguments))


def save(folder, phase, step, *, finished):
    state = {"params": {"network": {"w": np.full(3, step, np.float32)}}}
    record = Record({"name": "resnet8", "width": 1.0}, channels=1, finished=finished)
    with Checkpoints(folder / phase / "checkpoints", 2) as checkpoints:
        checkpoints.save(step, state, record, 0.5)


@pytest.fixture
def run(tmp_path):
    """Workdir of a run whose student has a checkpoint."""
    claim(tmp_path, asked(), dataset())
    (tmp_path / "student" / "checkpoints" / "3").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def finished(tmp_path):
    """Workdir of a finished run."""
    claim(tmp_path, asked(), dataset())
    save(tmp_path, "teacher", 5, finished=True)
    save(tmp_path, "student", 2, finished=False)
    save(tmp_path, "student", 7, finished=True)
    (tmp_path / "results.json").write_text("{}")
    return tmp_path


def test_results_of_something_else(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    for use in (lambda: is_done(tmp_path, EPOCHS), lambda: claim(tmp_path, asked(), dataset())):
        with pytest.raises(UserError, match="holds results.json but no config.json of its run; use another --workdir"):
            use()


def recorded(folder):
    return json.loads((folder / "config.json").read_text())


def test_config_of_a_workdir_is_flat(run):
    flat = recorded(run)
    assert flat["losses.kd.temperature"] == 4.0
    assert flat["dataset.train_examples"] is None
    assert len(flat[DATA_FINGERPRINT]) == 16
    assert flat.keys() - asked().keys() == {DATA_FINGERPRINT}
    assert schema.plain(run_config(run)) == asked()


@pytest.mark.parametrize(
    "override",
    [
        {"log_every": 3},
        {"keep_checkpoints": 7},
        {"dataset__data_dir": "/elsewhere"},
        {"dataset__path": "/elsewhere"},
        {"dataset__streaming": True},
        {"dataset__workers": 3},
    ],
    ids=str,
)
def test_what_does_not_change_results_may_change(run, override):
    claim(run, asked(**override), dataset())
    ((key, value),) = override.items()
    assert recorded(run)[key.replace("__", ".")] == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"seed": 1}, r"another configuration \(seed 0 != 1\); use another --workdir"),
        ({"losses__kd__temperature": 2, "augment__flip": True}, r"augment.flip False != True, losses.kd.temperature 4"),
        ({"epochs": 29}, r"\(epochs 30 != 29: a run can be extended to more epochs, but not cut to fewer\)"),
        (
            {"teacher__epochs": 40},
            r"\(teacher.epochs 30 != 40: the student has learned from a teacher trained for 30 epochs\)",
        ),
        (
            {"epochs": 40, "optimizer__schedule": "cosine"},
            r"\(epochs 30 != 40, optimizer.schedule 'step' != 'cosine'\)",
        ),
        ({"epochs": 40, "seed": 1}, r"\(epochs 30 != 40, seed 0 != 1\)"),
    ],
    ids=str,
)
def test_other_differences_are_refused(run, override, message):
    with pytest.raises(UserError, match=message):
        claim(run, asked(**override), dataset())
    assert recorded(run) == asked() | {DATA_FINGERPRINT: recorded(run)[DATA_FINGERPRINT]}


def test_what_nothing_reads_may_differ(run):
    """Earlier versions allowed such overrides, and now they cannot be repeated."""
    flat = recorded(run)
    (run / "config.json").write_text(json.dumps(flat | {"optimizer.beta1": 0.8}))
    claim(run, asked(), dataset())
    assert recorded(run)["optimizer.beta1"] == 0.9
    (run / "config.json").write_text(json.dumps(flat | {"optimizer.momentum": 0.8}))
    with pytest.raises(UserError, match="optimizer.momentum 0.8 != 0.9"):
        claim(run, asked(), dataset())


def test_without_checkpoints_a_workdir_may_become_that_of_any_run(tmp_path):
    claim(tmp_path, asked(), dataset())
    (tmp_path / "metrics.jsonl").touch()
    claim(tmp_path, asked(word="ce", epochs=3), dataset(1))
    assert recorded(tmp_path)["epochs"] == 3
    assert not (tmp_path / "metrics.jsonl").exists()


def test_other_data_are_refused(run):
    with pytest.raises(UserError, match=r"^workdir .* \(dataset fingerprint '\w+' != '\w+': the data differ in"):
        claim(run, asked(dataset__data_dir="/elsewhere"), dataset(1))


def test_data_of_a_finished_run_that_are_named_elsewhere(run):
    elsewhere = asked(dataset__data_dir="/elsewhere")
    assert names_same_data(run, asked())
    assert not names_same_data(run, elsewhere)
    check_data(run, elsewhere, dataset())
    with pytest.raises(UserError, match="the data differ"):
        check_data(run, elsewhere, dataset(1))


def test_a_workdir_without_a_fingerprint_gains_it(run):
    (run / "config.json").write_text(json.dumps(asked()))
    claim(run, asked(), dataset())
    assert DATA_FINGERPRINT in recorded(run)
    with pytest.raises(UserError, match="the data differ"):
        claim(run, asked(), dataset(1))


def test_missing_keys_are_defaults(run):
    flat = recorded(run)
    for key in ("augment.flip", "losses.kd.temperature", "losses.kd.warmup_epochs"):
        del flat[key]
    (run / "config.json").write_text(json.dumps(flat))
    check_workdir(run, asked())
    with pytest.raises(UserError, match=r"\(losses.kd.temperature 4.0 != 2.0\)"):
        check_workdir(run, asked(losses__kd__temperature=2))


def test_key_of_a_later_version(run):
    (run / "config.json").write_text(json.dumps(recorded(run) | {"ema.decay": 0.9}))
    with pytest.raises(UserError, match=r"\(ema.decay 0.9 != None\)"):
        check_workdir(run, asked())


@pytest.mark.parametrize("key", ["x version", "x.y.z version"])
def test_a_version_of_nothing(key, run):
    (run / "config.json").write_text(json.dumps(recorded(run) | {key: 2}))
    with pytest.raises(UserError, match=rf"\({key} 2 != "):
        check_workdir(run, asked())


def test_a_changed_formula(run, monkeypatch):
    class Changed(LOSSES["kd"]):
        version: ClassVar[int] = 2

    assert not any(key.endswith("version") for key in asked())
    monkeypatch.setitem(LOSSES, "kd", Changed)
    message = r"\(losses.kd version 1 != 2: the formula of the loss kd has changed between versions of cskd_jax\); use "
    with pytest.raises(UserError, match=message):
        check_workdir(run, asked())
    with pytest.raises(UserError, match=r"losses.kd version 1 != 2"):
        check_workdir(run, asked(epochs=40))
    assert identify(load_recipe("digits:ce", [])).keys() == asked(word="ce").keys(), "another loss"
    (run / "config.json").write_text(json.dumps(asked()))
    check_workdir(run, asked())
    assert run_config(run).losses.kd.temperature == 4.0


def test_a_changed_optimizer(tmp_path):
    now = asked(optimizer__name="dot", optimizer__restart_momentum=False)
    (tmp_path / "student" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(now | {"optimizer.dot version": 2}))
    with pytest.raises(
        UserError, match=r"\(optimizer.dot version 2 != 3: the formula of the optimizer dot has changed"
    ):
        check_workdir(tmp_path, now)


def test_more_epochs_extend_a_finished_run(finished, capsys):
    before = load_variables(str(finished / "student"))
    assert before.record.finished
    assert is_done(finished, EPOCHS)
    assert not is_done(finished, 40)
    claim(finished, asked(epochs=40), dataset())
    assert "student: extended from 30 to 40 epochs" in capsys.readouterr().out
    assert not (finished / "results.json").exists()
    assert recorded(finished)["epochs"] == 40
    # Read back: its digests are sound.
    after = load_variables(str(finished / "student"))
    assert after.record == dataclasses.replace(before.record, finished=False)
    assert (after.step, after.digest) == (before.step, before.digest)
    assert load_variables(str(finished / "teacher")).record.finished


@pytest.mark.parametrize("moment", ["mark_unfinished", "write_json"])
def test_killed_while_a_run_is_extended(finished, monkeypatch, moment):
    """The same command again extends it, and meanwhile it is not taken for done."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workdir, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            claim(finished, asked(epochs=40), dataset())
    assert not is_done(finished, EPOCHS)
    assert recorded(finished)["epochs"] == EPOCHS
    claim(finished, asked(epochs=40), dataset())
    assert recorded(finished)["epochs"] == 40
    assert not load_variables(str(finished / "student")).record.finished


def test_a_damaged_checkpoint_is_not_touched(finished):
    path = finished / "student" / "checkpoints" / "7" / "record" / "metadata"
    content = path.read_text().replace("resnet8", "resnet9")
    path.write_text(content)
    claim(finished, asked(epochs=40), dataset())
    assert path.read_text() == content


def test_schedules_may_forbid_more_epochs(run, monkeypatch):
    monkeypatch.setattr(schema, "why_not_extend", lambda old: f"no schedule beyond {old['epochs']}")
    with pytest.raises(UserError, match=r"\(epochs 30 != 40: no schedule beyond 30\)"):
        check_workdir(run, asked(epochs=40))


def test_a_teacher_trains_longer_as_long_as_it_has_no_student(tmp_path):
    claim(tmp_path, asked(), dataset())
    save(tmp_path, "teacher", 5, finished=True)
    with pytest.raises(UserError, match="teacher.epochs 30 != 20: a run can be extended to more epochs"):
        check_workdir(tmp_path, asked(teacher__epochs=20))
    claim(tmp_path, asked(teacher__epochs=40), dataset())
    assert not load_variables(str(tmp_path / "teacher")).record.finished


def test_without_a_teacher_its_epochs_are_a_key_like_others(tmp_path):
    claim(tmp_path, asked(word="ce"), dataset())
    (tmp_path / "student" / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match=r"\(teacher.epochs 30 != 40\)"):
        check_workdir(tmp_path, asked(word="ce", teacher__epochs=40))


def test_a_sweep_extends_its_runs(tmp_path):
    (run,) = grid.make_grid("digits", ["ce"], [0], tmp_path, [])
    run.workdir.mkdir()
    claim(run.workdir, identify(run.config), dataset())
    save(run.workdir, "student", 7, finished=True)
    (run.workdir / "results.json").write_text("{}")
    assert run.done
    (longer,) = grid.make_grid("digits", ["ce"], [0], tmp_path, ["--config.epochs=40"])
    assert not longer.done
    check_workdir(longer.workdir, identify(longer.config))
    (shorter,) = grid.make_grid("digits", ["ce"], [0], tmp_path, ["--config.epochs=20"])
    with pytest.raises(UserError, match="not cut to fewer"):
        grid.check([shorter])


def test_a_teacher_with_students_is_not_extended(tmp_path):
    """As when a method is added to a sweep, and the overrides of the first command are forgotten."""
    shorter = [f"--config.{key}=4" for key in ("teacher.epochs", "epochs")]
    teacher, student = grid.make_grid("digits", ["kd"], [0], tmp_path, shorter)
    teacher.workdir.mkdir()
    claim(teacher.workdir, identify(teacher.config), dataset())
    save(teacher.workdir, "student", 7, finished=True)
    longer, _ = grid.make_grid("digits", ["dkd"], [0], tmp_path, [])
    grid.check([longer])
    assert longer.workdir == teacher.workdir
    student.workdir.mkdir()
    claim(student.workdir, identify(student.config), dataset())
    with pytest.raises(UserError, match="trained for 4 epochs, and kd-seed0 has learned from it, .* trained for 30"):
        grid.check([longer])
    grid.check([teacher])


def test_long_values_do_not_hide_what_to_do(run):
    """A line of megabytes would."""
    flat = recorded(run) | {"unknown": "x" * 10**6, "y" * 10**6: 1}
    (run / "config.json").write_text(json.dumps(flat), encoding="utf-8")
    with pytest.raises(UserError, match=r"unknown 'x{98}… != None, y{99}… 1 != None\); use another --workdir$"):
        check_workdir(run, asked())
