"""Runs that are killed, stopped or damaged end with the same parameters, bit for bit, as one left alone."""

import json
import random
import resource
import signal
import subprocess
import time

import numpy as np
import pytest

from cskd_jax.training.checkpoint import load_variables
from tests.conftest import ROOT
from tests.tiers import chosen

pytestmark = pytest.mark.slow

BACKWARD_CLOCK = """
import itertools, time
hours = itertools.count()
now, now_ns = time.time, time.time_ns
time.time = lambda: now() - 3600 * next(hours)
time.time_ns = lambda: now_ns() - 3600 * 10**9 * next(hours)
"""


def final_parameters(workdir, phase):
    variables, record, *_ = load_variables(str(workdir / phase))
    return variables, record.progress["evaluations"]


def assert_same_run(actual, expected):
    for phase in ("teacher", "student"):
        variables, evaluations = final_parameters(actual, phase)
        wanted_variables, wanted_evaluations = final_parameters(expected, phase)
        assert evaluations == wanted_evaluations
        _assert_equal(variables, wanted_variables)
        kept, wanted_kept = (
            {path.name for path in (workdir / phase / "checkpoints").glob("*") if path.name.isdigit()}
            for workdir in (actual, expected)
        )
        assert kept == wanted_kept
    rows, wanted = (
        [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        for workdir in (actual, expected)
    )
    assert rows == wanted


def _assert_equal(tree, expected):
    if isinstance(tree, dict):
        assert tree.keys() == expected.keys()
        for key in tree:
            _assert_equal(tree[key], expected[key])
    else:
        np.testing.assert_array_equal(tree, expected)


def wait_for_row(workdir, process, phase, step):
    """Until metrics.jsonl has reached the step."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and any(
            f'"phase": "{phase}"' in row and f'"step": {step},' in row for row in path.read_text().splitlines()
        ):
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def test_killed_at_random_moments(start, small_run, done, tmp_path):
    seed = random.randrange(1000)
    print("seed", seed)
    rng = random.Random(seed)
    kills = 0
    while True:
        process = start([*small_run, f"--workdir={tmp_path}"])
        try:
            _, error = process.communicate(timeout=rng.uniform(1, 8) if kills < 6 else None)
            assert process.returncode == 0, error
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert kills > 0
    assert_same_run(tmp_path, done)


@pytest.mark.parametrize("number", chosen([signal.SIGTERM, signal.SIGINT], 1))
def test_stopped_by_a_signal(start, small_run, done, tmp_path, number):
    process = start([*small_run, f"--workdir={tmp_path}"])
    wait_for_row(tmp_path, process, "teacher", 3)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 75, error
    assert error.strip().splitlines()[-1].startswith(f"error: stopped by {signal.Signals(number).name}, saved at step")
    _, error = (process := start([*small_run, f"--workdir={tmp_path}"])).communicate()
    assert process.returncode == 0, error
    assert_same_run(tmp_path, done)


def start_up_to_checkpoint(start, small_run, workdir, step):
    """(process that still runs, folder of the student's checkpoints), when that of the step is there."""
    process = start([*small_run, f"--workdir={workdir}"])
    folder = workdir / "student" / "checkpoints"
    while process.poll() is None and not (folder / str(step)).exists():
        time.sleep(0.01)
    return process, folder


def test_damaged_checkpoint(start, small_run, done, tmp_path):
    process, folder = start_up_to_checkpoint(start, small_run, tmp_path, 6)
    process.kill()
    process.communicate()
    steps = sorted((int(path.name) for path in folder.iterdir() if path.name.isdigit()), reverse=True)
    # Orbax may keep an array in one of several files.
    for path in (folder / str(steps[0])).rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    _, error = (process := start([*small_run, f"--workdir={tmp_path}"])).communicate()
    assert process.returncode == 0, error
    assert f"checkpoints/{steps[0]} is damaged" in error
    assert_same_run(tmp_path, done)


def test_full_disk(start, small_run, done, tmp_path):
    """No file can grow beyond 20 kB any more: the log can be written, a checkpoint cannot."""
    process, folder = start_up_to_checkpoint(start, small_run, tmp_path, 3)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    _, error = process.communicate()
    assert process.returncode == 2, error
    # Among what Orbax has to say about it from threads of its own, which may leave a line open.
    assert f"error: cannot save a checkpoint in {folder}: " in error
    # The next one may have been written before the limit was set.
    assert {path.name for path in folder.iterdir() if path.name.isdigit()} in ({"3"}, {"3", "6"})
    # A clock that goes back an hour at every look does not matter.
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(BACKWARD_CLOCK)
    path = f"{tmp_path}/clock:{ROOT}"
    _, error = (process := start([*small_run, f"--workdir={tmp_path}"], PYTHONPATH=path)).communicate()
    assert process.returncode == 0, error
    assert_same_run(tmp_path, done)


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", ["crd", "kdgan"])
def test_memories_and_further_networks_resume(start, small_run, done, tmp_path, method):
    """Parameters, memories and optimizer of methods with a state of their own, by the digests saved with them."""
    arguments = [f"{small_run[0]}:{method}", *small_run[1:], f"--config.teacher.checkpoint={done}/teacher"]
    digests = {}
    for name in ("undisturbed", "killed"):
        workdir = tmp_path / name
        process = start([*arguments, f"--workdir={workdir}"])
        if name == "killed":
            while process.poll() is None and not (workdir / "student" / "checkpoints" / "3").exists():
                time.sleep(0.01)
            process.kill()
            process.communicate()
            assert not (workdir / "results.json").exists()
            process = start([*arguments, f"--workdir={workdir}"])
        output, error = process.communicate()
        assert process.returncode == 0, error
        assert ("resuming at step" in output) == (name == "killed")
        record = json.loads((workdir / "student" / "checkpoints" / "9" / "record" / "metadata").read_text())
        digests[name] = record["digests"]
    assert any(
        key.startswith({"crd": "memory/crd", "kdgan": "params/losses/kdgan"}[method]) for key in digests["killed"]
    )
    assert digests["killed"] == digests["undisturbed"]


@pytest.mark.exhaustive
def test_two_devices_end_where_one_does(start, small_run, done, tmp_path):
    """Through the whole loop; rounding differs, and a few steps of training enlarge it."""
    _, error = (process := start([*small_run, f"--workdir={tmp_path}"], devices=2)).communicate()
    assert process.returncode == 0, error
    actual, expected = (final_parameters(workdir, "teacher")[0] for workdir in (tmp_path, done))
    np.testing.assert_allclose(
        actual["params"]["stem"]["kernel"], expected["params"]["stem"]["kernel"], rtol=1e-3, atol=1e-4
    )
    assert json.loads((tmp_path / "results.json").read_text())["devices"]["count"] == 2


def test_no_traceback_in_a_process(start, small_run, tmp_path):
    (tmp_path / "file").touch()
    _, error = (process := start([*small_run, f"--workdir={tmp_path / 'file'}"])).communicate()
    assert process.returncode == 2
    assert error == f"error: {tmp_path / 'file'} is a file, not a folder\n"
    assert len(error.strip().splitlines()) == 1
