"""The processes of a run.

A run on several machines has one process for each machine (or GPU), which runs the same program on its rows of every
global batch. Only the first process reads and writes the workdir and prints messages; it tells the others what it finds
there, including errors.
"""

import os
import pickle
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from cskd_jax import console
from cskd_jax.errors import InterruptedRun, TransientError, UserError, one_line

# Seconds without a sign of life after which a process counts as dead, and JAX ends the others.
HEARTBEAT_SECONDS = 20
# Seconds that a finished process waits for the others to end too.
SHUTDOWN_SECONDS = 20
# Size in bytes of the message that tells the other processes about an error.
_MESSAGE_BYTES = 4096
_PART_BYTES = 1 << 30
# Errors that all processes raise because one of them did; the first byte of the message is the position.
_ERRORS = (UserError, TransientError)

T = TypeVar("T")


def initialize(coordinator: str | None, processes: int | None, process: int | None, cluster: bool = False) -> None:
    """Makes this process one of several, before any other use of JAX.

    Args:
      coordinator: Address HOST:PORT on which the first process listens; None, like `processes` and `process`, for a run
        of one process.
      processes: Number of processes.
      process: Number of this process, from 0.
      cluster: Whether to ask SLURM or the TPU pod instead. They are asked anyway within a job step of theirs that seems
        to have several processes.

    Raises:
      UserError: Some of the three are missing or invalid, or the port of the first process is in use.
    """
    if coordinator is None or processes is None or process is None or cluster:
        if (coordinator, processes, process) != (None, None, None):
            raise UserError("--coordinator, --processes and --process must be given together, and without --cluster")
        if not (cluster or _in_cluster(os.environ)):
            return
    else:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator must be HOST:PORT; got {coordinator}")
        if not 0 <= process < processes:
            raise UserError(f"--process must be from 0 to --processes - 1 = {processes - 1}; got {process}")
        if process == 0:
            _check_free(int(port))
    with console.pause("waiting for the other processes"):
        try:
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except ValueError as error:
            raise UserError(f"--cluster: neither SLURM nor a TPU pod says which process this is ({error})") from None
        _connect()
    if not is_first():
        console.mute()


def _check_free(port: int) -> None:
    """Raises TransientError if the port on which the first process listens is in use, which would crash JAX."""
    both = socket.has_dualstack_ipv6()
    try:
        with socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both):
            pass
    except (OSError, OverflowError) as error:
        raise TransientError(
            f"--coordinator: cannot listen on port {port} of this machine: {one_line(error)}"
        ) from None


def _connect():
    """Connects the processes. Between CPUs, Gloo does this and prints to standard output, which is not its to use.

    No other connections are made later, because all exchanges are between all devices.
    """
    if jax.default_backend() != "cpu":
        return
    sys.stdout.flush()
    own, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        multihost_utils.sync_global_devices("start")
    finally:
        os.dup2(own, 1)
        os.close(own)
        os.close(nowhere)


def _in_cluster(environment):
    # SLURM_NTASKS would be the number for the whole job, in which an interactive step is one task.
    return int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def is_first() -> bool:
    """Returns whether this process is the one that reads and writes the workdir and prints messages."""
    # Orbax saves arrays only in the process with this index, which on a TPU slice may not be that of the first worker.
    # A program that computes nothing itself must not take the devices by asking for its index.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def is_distributed() -> bool:
    """Returns whether there are other processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def on_first(function: Callable[..., T], *args: Any) -> T:
    """Calls the function on the first process; all processes return its value, or raise its UserError or OSError."""
    if not is_distributed():
        return function(*args)
    outcome = _outcome(function, *args) if is_first() else None
    content = np.frombuffer(pickle.dumps(outcome), np.uint8)
    # Devices have no 64-bit integers, so what is large is sent in parts.
    sizes = np.array(divmod(content.size, _PART_BYTES), np.int32)
    parts, rest = map(int, multihost_utils.broadcast_one_to_all(sizes))
    received = []
    for number, size in enumerate([_PART_BYTES] * parts + [rest] * (rest > 0)):
        part = content[_PART_BYTES * number :][:size] if is_first() else np.zeros(size, np.uint8)
        received.append(np.asarray(multihost_utils.broadcast_one_to_all(part)).tobytes())
    value, error = pickle.loads(b"".join(received))
    if error is not None:
        raise error
    return value


def first_then_all(function: Callable[[], T]) -> T:
    """Calls the function on the first process and then on all others, which find its files on a shared disk.

    Raises:
      UserError: On all processes, the error of the first process that raised one.
    """
    if not is_distributed():
        return function()
    outcome = _outcome(function) if is_first() else None
    _raise_everywhere(outcome and outcome[1])
    value, error = outcome or _outcome(function)
    _raise_everywhere(error)
    return value


def _outcome(function: Callable[..., Any], *args: Any) -> tuple[Any, Exception | None]:
    """Calls the function; returns (value, None), or (None, the error)."""
    try:
        return function(*args), None
    except (UserError, OSError) as error:
        return None, error


def _raise_everywhere(error):
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    if error is not None:
        kind = _ERRORS.index(TransientError if isinstance(error, TransientError) else UserError)
        content = bytes([kind]) + f"process {jax.process_index()}: {error}".encode()[: _MESSAGE_BYTES - 1]
        message[: len(content)] = np.frombuffer(content, np.uint8)
    for row in multihost_utils.process_allgather(message):
        if row.any():
            raise _ERRORS[row[0]](row[1:].tobytes().rstrip(b"\0").decode(errors="replace"))


def stop_agreed(call: int) -> bool:
    """Returns whether all processes stop here because one of them was sent SIGTERM.

    Args:
      call: Number of the call, one more than that of the call before, the same on all processes.
    """
    return multihost_utils.reached_preemption_sync_point(call)


def leave(code: int) -> None:
    """Ends the process with an exit code; after an error it does not wait for others, which may wait for it."""
    if code in (0, InterruptedRun.exit_code) or not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        # The others are aborted as soon as this one is gone; until then, those that know of the error can end.
        time.sleep(2)
    os._exit(code)
