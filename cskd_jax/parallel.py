"""Devices and processes: the only file that names `jax.pmap`, device counts or processes.

A run on several machines is one process a machine (or a GPU), each of which runs the same program on its rows of every
global batch. The first process alone reads and writes the workdir and speaks to people; what it finds there it tells
the others, its errors too.
"""

import functools
import os
import pickle
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cskd_jax.errors import InterruptedRun, UserError

# Name of the mapped axis over which every global batch is split.
AXIS = "devices"

# After so many seconds without a sign of life a process counts as dead, and JAX ends the others.
HEARTBEAT_SECONDS = 20
# So long a process that has ended waits for the others to end too.
SHUTDOWN_SECONDS = 20
# An error is told to the other processes in a message of so many bytes.
_MESSAGE_BYTES = 4096

T = TypeVar("T")


def initialize(coordinator: str | None, processes: int | None, process: int | None, cluster: bool = False) -> None:
    """Makes this process one of several, before any other use of JAX.

    Args:
      coordinator: HOST:PORT of the first process, on which it listens; None with `processes` and `process` too for a
        run of one process.
      processes: how many there are.
      process: which of them this is, from 0.
      cluster: asks SLURM or the TPU pod instead; what looks like a step of one of them with several processes is
        asked even without.

    Raises:
      UserError: some of the three are missing or make no sense.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given):
        if cluster or not all(given):
            raise UserError("--coordinator, --processes and --process are given together, and without --cluster")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator must be HOST:PORT; got {coordinator}")
        if not 0 <= process < processes:
            raise UserError(f"--process must be from 0 to --processes - 1 = {processes - 1}; got {process}")
    elif not (cluster or _in_cluster(os.environ)):
        return
    timeouts = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, "shutdown_timeout_seconds": SHUTDOWN_SECONDS}
    try:
        jax.distributed.initialize(coordinator, processes, process, **timeouts)
    except ValueError as error:
        raise UserError(f"--cluster: neither SLURM nor a TPU pod says which process this is ({error})") from None


def _in_cluster(environment):
    # SLURM_NTASKS would be that of the job, of which an interactive step is one task.
    return int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def is_first() -> bool:
    """Whether this process is the one that reads and writes the workdir and speaks to people."""
    # A program that computes nothing itself must not take the devices by asking.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def is_distributed() -> bool:
    """Whether there are other processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def on_first(function: Callable[..., T], *args: Any) -> T:
    """Calls the function on the first process; all processes return its value, or raise its UserError or OSError."""
    if not is_distributed():
        return function(*args)
    outcome = _outcome(function, *args) if is_first() else None
    content = np.frombuffer(pickle.dumps(outcome), np.uint8)
    size = multihost_utils.broadcast_one_to_all(np.int32(content.size))
    content = multihost_utils.broadcast_one_to_all(content if is_first() else np.zeros(size, np.uint8))
    value, error = pickle.loads(content.tobytes())
    if error is not None:
        raise error
    return value


def first_then_all(function: Callable[[], T]) -> T:
    """Calls the function on the first process and then on all others, which find what the first put on a shared disk.

    Raises:
      UserError: that of the first process that met one, on all of them.
    """
    if not is_distributed():
        return function()
    value, error = _outcome(function) if is_first() else (None, None)
    _raise_everywhere(error)
    if not is_first():
        value, error = _outcome(function)
    _raise_everywhere(error)
    return value


def _outcome(function, *args):
    """(value, None), or (None, the error)."""
    try:
        return function(*args), None
    except (UserError, OSError) as error:
        return None, error


def _raise_everywhere(error):
    message = np.zeros(_MESSAGE_BYTES, np.uint8)
    if error is not None:
        content = f"process {jax.process_index()}: {error}".encode()[:_MESSAGE_BYTES]
        message[: len(content)] = np.frombuffer(content, np.uint8)
    for row in multihost_utils.process_allgather(message):
        if row.any():
            raise UserError(row.tobytes().rstrip(b"\0").decode(errors="replace"))


def stop_agreed(call: int) -> bool:
    """Whether all processes stop here because one of them was sent SIGTERM.

    Args:
      call: 1, 2, ...; the same on all processes.
    """
    return multihost_utils.reached_preemption_sync_point(call)


def leave(code: int) -> None:
    """Ends the process with an exit code; after an error without waiting for others, which may wait for this one."""
    if code in (0, InterruptedRun.exit_code) or not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        # The others are aborted as soon as this one is gone: those that know of the error may end by themselves.
        time.sleep(2)
    os._exit(code)


def describe_devices() -> dict[str, Any]:
    """What a run computes on, for its results."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "processes": jax.process_count(),
    }


def check_batch_size(name: str, size: int) -> None:
    """Raises UserError unless a global batch of `size` splits evenly over the devices."""
    if size % jax.device_count():
        raise UserError(f"{name} is {size}, which does not divide by the {jax.device_count()} devices")


def round_up_to_devices(size: int) -> int:
    """The smallest multiple of the number of devices that is not below `size`."""
    return -(-size // jax.device_count()) * jax.device_count()


def local_rows(size: int) -> slice:
    """The rows of a global batch of `size` that this process computes: contiguous, in the order of the processes."""
    rows = size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def replicate(tree: Any) -> Any:
    """Puts a tree of arrays that are equal on all processes on every device."""
    sharding = NamedSharding(_mesh(), PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), jax.device_get(tree))


def shard(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The `local_rows` of all processes as a batch [devices, B / devices, ...], each part of it on its device."""
    sharding, devices = NamedSharding(_mesh(), PartitionSpec(AXIS)), jax.local_device_count()

    def place(rows):
        rows = rows.reshape(devices, len(rows) // devices, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, (jax.device_count(), *rows.shape[1:]))

    return jax.tree.map(place, batch)


def _devices():
    """All devices, those of a process beside each other."""
    return sorted(jax.devices(), key=lambda device: (device.process_index, device.id))


@functools.cache  # Every batch asks for it, and devices do not change.
def _mesh():
    return Mesh(np.array(_devices()), (AXIS,))


def parallel_train_step(step: Callable) -> Callable:
    """Maps `(state, teacher_variables, batch, key) -> (state, metrics)` over the devices.

    State, variables and key are the same on all devices and stay whole arrays; the batch is `shard`ed. The state is
    donated: its buffers become those of the new state.
    """
    axes = {"in_axes": (None, None, 0, None), "out_axes": (None, None)}
    return jax.pmap(step, axis_name=AXIS, devices=_devices(), donate_argnums=(0,), **axes)


def parallel_eval_step(step: Callable) -> Callable:
    """Maps `(variables, batch) -> sums` over the devices."""
    return jax.pmap(step, axis_name=AXIS, devices=_devices(), in_axes=(None, 0), out_axes=None)


def lower(mapped: Callable, *args: Any) -> jax.stages.Lowered:
    """Traces a mapped step for arguments like these, arrays or only their shapes and types.

    What is compiled from it takes arrays that are `replicate`d and `shard`ed.
    """
    if is_distributed():
        # pmap then wants arrays. These take memory until it has traced.
        args = jax.tree.map(_zeros_for_shape, args)
    return mapped.lower(*args)


def _zeros_for_shape(x):
    is_shape = isinstance(x, jax.ShapeDtypeStruct)
    return np.broadcast_to(np.zeros((), x.dtype), x.shape) if is_shape else x


def max_steps_in_flight() -> int:
    """How many steps may be dispatched before the host waits for the oldest.

    A few keep a device busy while the host prepares what follows. CPU devices share one thread pool: with two steps in
    flight the threads of the first can all wait for a device whose turn never comes.
    """
    several_cpu_devices = jax.default_backend() == "cpu" and jax.device_count() > 1
    return 1 if several_cpu_devices else 4
