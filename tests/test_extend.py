"""A run that is given more epochs ends, bit for bit, as one that had them from the start."""

import json
import time

import pytest

from cskd_jax.main import main
from tests.test_resume import assert_same_run

pytestmark = pytest.mark.slow


def digests(workdir, phase):
    """Digests of all arrays of the newest checkpoint: parameters, optimizer, memories."""
    newest = max((workdir / phase / "checkpoints").iterdir(), key=lambda path: int(path.name))
    return json.loads((newest / "record" / "metadata").read_text())["digests"]


def run(start, arguments):
    output, error = (process := start(arguments)).communicate()
    assert process.returncode == 0, error
    return output


def without_speed(results):
    for phase in ("teacher", "student"):
        del results[phase]["images_per_second"]
    return results


def test_extended_run_is_the_longer_run(start, small_run, done, tmp_path, capsys):
    """`done` has had its three epochs from the start."""
    arguments = [*small_run, f"--workdir={tmp_path}"]
    run(start, [*arguments, "--config.epochs=2"])
    assert main(["main", *arguments, "--config.epochs=2"]) == 0
    assert "already done" in capsys.readouterr().out
    output = run(start, arguments)
    assert "student: extended from 2 to 3 epochs" in output
    assert "student: resuming at step 6 of 9" in output
    assert "teacher: training" not in output
    assert_same_run(tmp_path, done)
    for phase in ("teacher", "student"):
        assert digests(tmp_path, phase) == digests(done, phase)
    results, expected = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, done))
    assert without_speed(results) == without_speed(expected)
    assert main(["main", *arguments]) == 0
    assert "already done" in capsys.readouterr().out
    assert main(["main", *arguments, "--config.epochs=2"]) == 2
    assert "epochs 3 != 2: a run can be extended to more epochs, but not cut to fewer" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_killed_while_it_trains_longer(start, small_run, done, tmp_path):
    """It is neither done nor a finished teacher until it has all its epochs."""
    arguments = [*small_run, f"--workdir={tmp_path}"]
    run(start, [*arguments, "--config.epochs=1"])
    process = start(arguments)
    while process.poll() is None and not (tmp_path / "student" / "checkpoints" / "6").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    if not (tmp_path / "results.json").exists():
        student = [f"--config.teacher.checkpoint={tmp_path}/student", f"--workdir={tmp_path / 'other'}"]
        _, error = (process := start([*small_run, *student])).communicate()
        assert process.returncode == 2
        assert "is not fully trained" in error
    run(start, arguments)
    assert_same_run(tmp_path, done)
    assert digests(tmp_path, "student") == digests(done, "student")


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["crd", "fsp"])
def test_memories_and_schedules_of_losses(start, small_run, done, tmp_path, method):
    """A memory, and losses that begin and end in some epoch."""
    arguments = [f"{small_run[0]}:{method}", *small_run[1:], f"--config.teacher.checkpoint={done}/teacher"]
    run(start, [*arguments, f"--workdir={tmp_path / 'longer'}"])
    run(start, [*arguments, f"--workdir={tmp_path / 'extended'}", "--config.epochs=1"])
    run(start, [*arguments, f"--workdir={tmp_path / 'extended'}"])
    assert digests(tmp_path / "extended", "student") == digests(tmp_path / "longer", "student")
