"""A grid of runs: what it runs; killed, stopped and continued; runs that fail; and what is measured of its networks."""

import json
import os
import signal
import time

import numpy as np
import pytest

from cskd_jax.commands.sweep import main as sweep_main
from cskd_jax.errors import UserError
from cskd_jax.evaluate.__main__ import main as evaluate_main
from cskd_jax.report.__main__ import main as report_main
from cskd_jax.runs import grid, lock, schema, sweep
from cskd_jax.runs.workdir import TEACHER_DIGEST, check_workdir
from cskd_jax.training.checkpoint import Checkpoints
from cskd_jax.training.saved import Record
from tests.conftest import ROOT

DIGITS = f"{ROOT}/configs/digits.py"


def test_grid(tmp_path):
    overrides = ["--config.epochs=2", "--config.teacher.width=0.5", "--config.losses.kd.temperature=2.0"]
    runs = grid.make_grid(DIGITS, ["ce", "kd", "R18_0.25/R34_0.125/kd"], [3, 4], tmp_path, overrides)
    assert [run.name for run in runs] == [
        *("teacher-resnet18_0.5", "ce-seed3", "kd-seed3", "R18_0.25/R34_0.125/kd-seed3"),
        *("ce-seed4", "kd-seed4", "R18_0.25/R34_0.125/kd-seed4"),
    ]
    teacher, ce, kd = runs[:3]
    assert (teacher.config.student.name, teacher.config.student.width) == ("resnet18", 0.5)
    assert (teacher.config.epochs, teacher.config.seed, list(teacher.config.losses)) == (30, 0, ["cross_entropy"])
    assert (ce.config.epochs, ce.config.seed, ce.config.teacher.checkpoint, ce.teacher) == (2, 3, None, None)
    assert (kd.config.losses.kd.temperature, kd.teacher) == (2.0, teacher)
    assert kd.config.teacher.checkpoint == f"{tmp_path}/teacher-resnet18_0.5/student"


def test_combined_methods(tmp_path):
    overrides = ["--config.losses.kd.temperature=2.0"]
    runs = grid.make_grid(DIGITS, ["AT", "kd+at", "R18_0.25/R18_0.125/Kd+At"], [0], tmp_path, overrides)
    assert [run.name for run in runs[1:]] == ["at-seed0", "at+kd-seed0", "R18_0.25/R18_0.125/at+kd-seed0"]
    assert {run.config.method for run in runs[2:]} == {"at+kd"}
    assert [run.config.losses.kd.temperature for run in runs[2:]] == [2.0, 2.0]


def test_teacher_of_each_network_and_of_several_categories(tmp_path):
    runs = grid.make_grid(DIGITS, ["kd", "R34_0.5/R18_0.125/kd", "at"], [0], tmp_path, [])
    assert [run.name for run in runs[:2]] == ["teacher-resnet18_0.25", "teacher-resnet34_0.5"]
    assert runs[4].teacher == runs[0]
    teacher, _ = grid.make_grid(f"{ROOT}/configs/digit_pairs.py", ["mlcskd"], [0], tmp_path, [])
    assert list(teacher.config.losses) == ["binary_cross_entropy"]
    given = grid.make_grid(DIGITS, ["kd"], [0], tmp_path, ["--config.teacher.checkpoint=/somewhere"])
    assert [(run.teacher, run.config.teacher.checkpoint) for run in given] == [(None, "/somewhere")]


BAD_INPUT = {
    "no recipe": (["--methods=ce"], ["--config=RECIPE must name a file"]),
    "no method": ([f"--config={DIGITS}"], ["--methods=ce,kd,cskd"]),
    "method in the recipe": ([f"--config={DIGITS}:kd", "--methods=ce"], ["takes its methods from --methods"]),
    "unknown method": ([f"--config={DIGITS}", "--methods=ce,kdd"], ["unknown method 'kdd'; did you mean kd?"]),
    "seed that is none": ([f"--config={DIGITS}", "--methods=ce", "--seeds=0,x"], ["--seeds is 0,x"]),
    "seed twice": ([f"--config={DIGITS}", "--methods=ce", "--seeds=1,0,1"], ["--seeds lists 1 twice"]),
    "no jobs": ([f"--config={DIGITS}", "--methods=ce", "--jobs=0"], ["jobs", "0"]),
    "unknown key": ([f"--config={DIGITS}", "--methods=ce", "--config.epoch=1"], ["epoch; did you mean epochs"]),
    "loss of no method": ([f"--config={DIGITS}", "--methods=ce", "--config.losses.kd.weight=1"], ["has no kd"]),
    "no such teacher": (
        [f"--config={DIGITS}", "--methods=kd", "--config.teacher.checkpoint=/no/such"],
        ["teacher.checkpoint /no/such does not exist"],
    ),
    "file as a teacher": (
        [f"--config={DIGITS}", "--methods=kd", f"--config.teacher.checkpoint={DIGITS}"],
        [f"teacher.checkpoint {DIGITS} is a file", "cskd-jax import-torch"],
    ),
    "no such student": (
        [f"--config={DIGITS}", "--methods=kd", "--config.student.checkpoint=/no/such"],
        ["no checkpoint in /no/such/checkpoints"],
    ),
    "wrong value": ([f"--config={DIGITS}", "--methods=ce", "--config.epochs=0"], ["epochs is 0"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, tmp_path, capsys):
    arguments, words = BAD_INPUT[case]
    assert sweep_main(["sweep", *arguments, f"--workdir={tmp_path / 'sweep'}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for word in words:
        assert word in line
    assert not (tmp_path / "sweep").exists()


def test_given_checkpoints_are_checked_first(tmp_path):
    """By their records alone: a sweep does not use the devices that its runs need."""
    with Checkpoints(tmp_path / "given" / "checkpoints", 2) as given:
        given.save(1, {"params": {"w": np.zeros(1)}}, Record({"name": "resnet8", "width": 1.0}, channels=1))
    for role in ("student", "teacher"):
        runs = grid.make_grid(DIGITS, ["kd"], [0], tmp_path, [f"--config.{role}.checkpoint={tmp_path / 'given'}"])
        with pytest.raises(UserError, match=rf"^{role}.checkpoint .* holds .*'resnet8'.* specifies .*'resnet18'"):
            grid.check(runs)
    fitting = [f"--config.teacher.checkpoint={tmp_path / 'given'}", "--config.teacher.name=resnet8"]
    with pytest.raises(UserError, match="is not fully trained"):
        grid.check(grid.make_grid(DIGITS, ["kd"], [0], tmp_path, [*fitting, "--config.teacher.width=1"]))


def test_two_teachers_of_one_name(tmp_path):
    """A recipe in which methods have different epochs for the same teacher needs a sweep for each."""
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from cskd_jax.configs import digits\n\n\ndef get_config(word='kd'):\n"
        "    config = digits.get_config(word)\n    config.teacher.epochs = 10 if word == 'kd' else 30\n"
        "    return config\n"
    )
    with pytest.raises(UserError, match=r"two runs .* stored in .*/teacher-resnet18_0.25, and they differ in epochs:"):
        grid.make_grid(str(recipe), ["kd", "at"], [0], tmp_path, [])


def test_seeds_of_teachers_that_nobody_has(tmp_path):
    with pytest.raises(UserError, match="--teacher_seeds trains teachers, but none of ce learns from one"):
        grid.make_grid(DIGITS, ["ce"], [0], tmp_path, [], teacher_seeds=(0, 1))


def test_folder_of_another_run(tmp_path):
    (run,) = grid.make_grid(DIGITS, ["ce"], [0], tmp_path, [])
    (run.workdir / "student" / "checkpoints" / "23").mkdir(parents=True)
    (run.workdir / "config.json").write_text(json.dumps({"epochs": 7}))
    with pytest.raises(UserError, match=r"another configuration.*epochs 7 != 30"):
        grid.check([run])


def test_teacher_that_has_moved(tmp_path):
    (run,) = grid.make_grid(DIGITS, ["kd"], [0], tmp_path, ["--config.teacher.checkpoint=here"])
    identity = schema.plain(run.config)
    (run.workdir / "student" / "checkpoints" / "23").mkdir(parents=True)
    (run.workdir / "config.json").write_text(json.dumps(identity | {TEACHER_DIGEST: "a"}))
    moved = identity | {"teacher.checkpoint": "there"}
    check_workdir(run.workdir, moved | {TEACHER_DIGEST: "a"})
    with pytest.raises(UserError, match="configuration .teacher.checkpoint digest 'a' != 'b'.;"):
        check_workdir(run.workdir, moved | {TEACHER_DIGEST: "b"})


def test_without_a_teacher_its_checkpoint_is_of_no_account(tmp_path):
    (run,) = grid.make_grid(DIGITS, ["ce"], [0], tmp_path, ["--config.teacher.checkpoint=here"])
    (run.workdir / "student" / "checkpoints" / "23").mkdir(parents=True)
    (run.workdir / "config.json").write_text(json.dumps(schema.plain(run.config)))
    check_workdir(run.workdir, schema.plain(run.config) | {"teacher.checkpoint": "there"})


def test_only_one_sweep_at_a_time(digits_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lock, "LOCAL_PATIENCE_SECONDS", 0)
    with lock.locked(tmp_path / "sweep.lock", ""):
        arguments = [
            f"--config={DIGITS}",
            "--methods=ce",
            f"--config.dataset.data_dir={digits_dir}",
            f"--workdir={tmp_path}",
        ]
        assert sweep_main(["sweep", *arguments]) == 2
    assert "another sweep is running" in capsys.readouterr().err


def test_gpus_are_shared_out():
    assert sweep.device_variables(0, 1, {}) == {}
    without_gpus = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_NUM_CPU_DEVICES": "1"}
    assert sweep.device_variables(1, 2, {"CUDA_VISIBLE_DEVICES": ""}) == without_gpus
    given = {"CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    assert "JAX_NUM_CPU_DEVICES" not in sweep.device_variables(1, 2, given)
    found = [sweep.device_variables(slot, 3, {"CUDA_VISIBLE_DEVICES": "2,5"}) for slot in range(3)]
    assert [variables["CUDA_VISIBLE_DEVICES"] for variables in found] == ["2", "5", "2"]


def test_the_gpus_of_a_machine_are_shared_out(tmp_path, monkeypatch):
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).write_bytes(b"")
    assert (sweep.gpus(tmp_path), sweep.gpus(tmp_path / "none")) == ("0,1,2", "")
    monkeypatch.setattr(sweep, "gpus", lambda: "0,1")
    found = [sweep.device_variables(slot, 3, {})["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert found == ["0", "1", "0"]


@pytest.mark.slow
# Other tests of this process have computed with JAX; a sweep never does.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_failing_run_does_not_stop_the_others(tmp_path, capsys):
    """A teacher that fails, what needs it, and one that fails by itself, beside one that is done."""
    done = grid.Run(tmp_path, "done", DIGITS, ())
    done.workdir.mkdir()
    for name in ("config.json", "results.json"):
        (done.workdir / name).write_text("{}")
    teacher = grid.Run(tmp_path, "teacher", "configs/nothing.py", ())
    needs_it = grid.Run(tmp_path, "kd", DIGITS, (), teacher)
    bad = grid.Run(tmp_path, "bad", DIGITS, ("--config.epochs=x",))
    with pytest.raises(sweep.FailedRunsError, match=r"3 of 4 runs failed: teacher, kd, bad; the same command"):
        sweep.sweep([[done], [teacher], [needs_it], [bad]], jobs=2)
    output = capsys.readouterr().out
    assert "4 runs, 1 done, 3 to go in 3 groups, 2 groups at a time" in output
    assert "teacher: FAILED: error: --config=RECIPE must name a file" in output
    assert "kd: not started: teacher failed" in output
    assert "bad: FAILED: error: epochs is 'x'" in output
    assert sweep.FailedRunsError.exit_code == 1


def wait_for(path, text, process):
    """Until the file holds the text."""
    while process.poll() is None:
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate())


def children(pid):
    """Processes that `pid` has started."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="utf-8") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow
def test_killed_stopped_and_continued(start, small_run, tmp_path, capsys):
    """Killed, stopped while all train together, continued; then the report and the evaluation of what is there."""
    arguments = [*small_run, "--config.epochs=2", "--methods=ce,kd", f"--workdir={tmp_path}"]
    teacher = tmp_path / "teacher-resnet8_0.25"
    process = start(arguments, program="cskd_jax.sweep")
    wait_for(teacher / "log.txt", "student: training", process)
    (child,) = children(process.pid)
    process.kill()
    process.communicate()
    for _ in range(100):
        if not os.path.exists(f"/proc/{child}"):
            break
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{child}"), "left behind"

    process = start([*arguments, "--jobs=2"], program="cskd_jax.sweep")
    wait_for(tmp_path / "ce-seed0" / "log.txt", "student: training", process)  # compiles next
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 75, error
    assert error.strip().splitlines()[-1].startswith("error: stopped by SIGTERM")
    assert "error: stopped by SIGTERM" in (tmp_path / "ce-seed0" / "log.txt").read_text()

    output, error = (process := start([*arguments, "--jobs=2"], program="cskd_jax.sweep")).communicate()
    assert process.returncode == 0, error
    assert "3 runs, " in output
    assert "[3/3] kd-seed0: last top-1 0." in output
    results = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/results.json")}
    assert results.keys() == {teacher.name, "ce-seed0", "kd-seed0"}
    assert results["kd-seed0"]["teacher"]["last"]["top1"] == results[teacher.name]["student"]["last"]["top1"]

    assert report_main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report" / "report.html").read_text()
    assert text.count('class="chart"') == 5, "two of curves, teacher, ce, kd"
    assert "Tightness of the classes" in text

    assert evaluate_main(["evaluate", f"--workdir={tmp_path / 'kd-seed0'}"]) == 0
    assert "million FLOPs per image" in capsys.readouterr().out
    measured = json.loads((tmp_path / "kd-seed0" / "evaluation.json").read_text())["networks"]["student"]
    expected = results["kd-seed0"]["student"]
    assert measured["by_category"] == expected["by_category"]
    assert measured["top1"] == expected["last"]["top1"]
    assert measured["parameters"] == expected["parameters"]
    assert set(measured["latency_ms"]) == {"batch 1", "batch 64"}
    assert min(measured["latency_ms"].values()) > 0


def test_a_first_phase_concerns_the_methods_that_have_one(tmp_path):
    override = "--config.first_phase.epochs=2"
    teacher, ce, fsp = grid.make_grid(DIGITS, ["ce", "fsp"], [0], tmp_path, [override])
    assert [run.config.first_phase.epochs for run in (teacher, ce, fsp)] == [0, 0, 2]
    grid.check([teacher, ce, fsp])
    with pytest.raises(UserError, match="first_phase.epochs is only for methods with a first phase, ab, fsp, ft, and"):
        grid.make_grid(DIGITS, ["ce", "kd"], [0], tmp_path, [override])


@pytest.mark.parametrize(
    ("last", "error"),
    [
        ("error: loss is nan\n", "loss is nan"),
        ("error: stopped by SIGTERM, saved at step 3 of the student: the same command resumes\n", None),
    ],
)
def test_a_run_that_was_stopped_has_not_failed(last, error, tmp_path):
    (tmp_path / "log.txt").write_text(f"student: training\n{last}")
    assert sweep.read_error(tmp_path) == error
