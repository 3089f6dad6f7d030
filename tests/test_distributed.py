"""Runs of two processes, started by launch/local.sh, against a run of one."""

import json
import os
import pathlib
import signal
import socket
import sys

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cskd_jax.training.checkpoint import load_variables
from tests.conftest import ROOT
from tests.test_resume import wait_for_row

pytestmark = pytest.mark.slow


LOCAL = (ROOT / "launch" / "local.sh", "2")


def test_two_processes_are_one(start, small_run, tmp_path):
    """In 64-bit, in memory and streamed, through a SIGTERM to one of two and an end with one: parameters, metrics."""
    arguments = [*small_run, "--config.dtype=float64"]
    arguments += ["--config.teacher.name=resnet8", "--config.student.name=resnet8"]  # Compiled in a third of the time.
    _, error = (process := start([*arguments, f"--workdir={tmp_path}/one"], JAX_ENABLE_X64="1")).communicate()
    assert process.returncode == 0, error
    arguments += [f"--config.teacher.checkpoint={tmp_path}/one/teacher", f"--workdir={tmp_path}/two"]
    streamed = [*arguments, "--config.dataset.streaming=True", "--config.dataset.workers=1"]
    process = start(streamed, program=LOCAL, PYTHON=sys.executable, JAX_ENABLE_X64="1")
    wait_for_row(tmp_path / "two", process, "student", 3)
    # Those of the supervisor.
    workers = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    os.kill(int(workers[1]), signal.SIGTERM)
    output, error = process.communicate()
    assert process.returncode == 75, error
    assert "2 x cpu" in output
    assert error.count("error: stopped by SIGTERM, saved at step") == 2
    output, error = (process := start(arguments, JAX_ENABLE_X64="1")).communicate()
    assert process.returncode == 0, error
    assert "student: resuming at step" in output
    actual, expected = (flatten_dict(load_variables(f"{tmp_path}/{name}/student")[0]) for name in ("two", "one"))
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert array.dtype == np.float64
        np.testing.assert_allclose(actual[name], array, rtol=0, atol=1e-10, err_msg="/".join(name))
    for actual, expected in zip(student_rows(tmp_path / "two"), student_rows(tmp_path / "one"), strict=True):
        assert actual == pytest.approx(expected, rel=1e-9)


def student_rows(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in ("phase", "split")}
        for row in rows
        if row["phase"] == "student"
    ]


def test_error_of_one_process_ends_both(start, small_run, tmp_path):
    """Data that one process alone cannot read."""
    (tmp_path / "file").touch()
    shared = [*small_run, f"--coordinator=localhost:{free_port()}", "--processes=2", f"--workdir={tmp_path}/run"]
    broken = f"--config.dataset.data_dir={tmp_path}/file"
    processes = [start([*shared, "--process=0"]), start([*shared, "--process=1", broken])]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 2, error
        assert error.strip().splitlines()[-1].startswith(f"error: process 1: {tmp_path}/file is a file")


ONE_FAILS = """
import sys

import jax.numpy as jnp
import numpy as np
import optax

import cskd_jax
from cskd_jax.data.arrays import from_arrays
from cskd_jax.distributed import processes

process, port, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
processes.initialize(f"localhost:{port}", 2, process)


class Fails(cskd_jax.Callback):
    def on_step(self, step, images, metrics):
        if process == 1 and step == 2:
            raise MemoryError("only here")


def linear(variables, images, train, rngs):
    return images.reshape(len(images), -1) @ variables["params"]["w"], {}


data = np.zeros((16, 2, 2, 1), np.float32), np.arange(16) % 2
student = cskd_jax.Student(
    linear, {"cross_entropy": 1.0}, optax.sgd(0.1), variables={"params": {"w": np.ones((4, 2), np.float32)}}
)
trainer = cskd_jax.Trainer(
    {"net": student}, data=from_arrays(data, data), phases=[cskd_jax.Phase(3)], batch_size=4, workdir=workdir,
    callbacks=[Fails()],
)
try:
    trainer.fit()
except MemoryError:
    processes.leave(7)
except BaseException:
    processes.leave(8)
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_an_error_in_training_of_one_process_ends_both(start, tmp_path):
    """It does not wait for the other, which waits for it in a step."""
    (tmp_path / "one_fails.py").write_text(ONE_FAILS)
    port, program = free_port(), (sys.executable, tmp_path / "one_fails.py")
    processes = [start([number, str(port), tmp_path / "run"], program=program) for number in "01"]
    codes = [process.wait(timeout=120) for process in reversed(processes)]
    assert codes[0] == 7, processes[1].stderr.read()
    assert codes[1] != 0
    for process in processes:
        process.communicate()


def test_an_address_that_is_taken(start, small_run, tmp_path):
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        address = f"--coordinator=localhost:{port}"
        arguments = [*small_run, address, "--processes=2", "--process=0", f"--workdir={tmp_path}"]
        _, error = (process := start(arguments)).communicate(timeout=120)
    assert process.returncode == 1, error
    wanted = f"error: --coordinator: cannot listen on port {port} of this machine: "
    assert error.strip().splitlines()[-1].startswith(wanted)
