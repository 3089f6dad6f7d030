"""Several processes, without starting any: how they are recognized, and that an error of the first reaches all."""

import numpy as np
import pytest

from cskd_jax.distributed import processes
from cskd_jax.distributed.signals import StopRequest
from cskd_jax.errors import TransientError, UserError
from cskd_jax.training.callbacks import Progress, Start
from cskd_jax.training.checkpoint import Checkpoints
from cskd_jax.training.metrics import SINGLE_LABEL
from cskd_jax.training.records import MetricsFiles

STEP = {"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4"}, False),
        (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, False),
        (STEP | {"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t1,t2"}, True),
    ],
    ids=["nowhere", "batch script", "interactive step", "step", "TPU VM", "TPU pod"],
)
def test_several_processes_are_recognized(environment, expected):
    assert processes._in_cluster(environment) == expected


def open_metrics(path):
    start = Start("x", 0, 1, 1, 0, 1, SINGLE_LABEL, Progress(), lambda _: None)
    MetricsFiles(path).on_start(start)


@pytest.mark.parametrize("open_files", [lambda path: Checkpoints(path, keep=1), open_metrics])
def test_all_processes_learn_what_the_first_cannot_open(open_files, tmp_path, monkeypatch):
    """As one of the others: it has no files to open itself, and must not go on."""

    def on_first(*_):
        raise UserError("told by the first")

    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes, "on_first", on_first)
    with pytest.raises(UserError, match="told by the first"):
        open_files(tmp_path)


@pytest.mark.parametrize("kind", [UserError, TransientError])
def test_errors_keep_their_kind_on_all_processes(kind, monkeypatch):
    """A transient one is worth another start, and no other is."""
    monkeypatch.setattr(processes, "is_distributed", lambda: True)
    monkeypatch.setattr(
        processes.multihost_utils, "process_allgather", lambda message: [np.zeros_like(message), message]
    )

    def fail():
        raise kind("too many open files")

    with pytest.raises(UserError, match="^process 0: too many open files$") as caught:
        processes.first_then_all(fail)
    assert type(caught.value) is kind


def test_calls_are_counted_from_above_all_steps(monkeypatch):
    """Orbax asks the same question with the step that it saves."""
    calls = []
    monkeypatch.setattr(processes, "is_distributed", lambda: True)
    monkeypatch.setattr(processes, "stop_agreed", calls.append)
    request = StopRequest()
    for _ in range(3):
        assert not request.reached()
    assert calls == [calls[0], calls[0] + 1, calls[0] + 2]
    assert 10**9 < calls[0] < 2**31 - 10**9


@pytest.mark.parametrize("value", [b"", b"a", b"0123456789abcdef"])
def test_what_is_large_is_sent_in_parts(value, monkeypatch):
    sent = []

    def broadcast(array):
        sent.append(array)
        return array

    monkeypatch.setattr(processes, "is_distributed", lambda: True)
    monkeypatch.setattr(processes, "_PART_BYTES", 8)
    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", broadcast)
    assert processes.on_first(lambda: value) == value
    received = iter(list(sent))
    monkeypatch.setattr(processes, "is_first", lambda: False)

    def receive(array):
        content = next(received)
        assert (array.shape, array.dtype) == (content.shape, content.dtype)
        return content

    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", receive)
    assert processes.on_first(lambda: value) == value
