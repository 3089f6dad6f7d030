"""The devices of a run: the only file that names `jax.pmap`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cskd_jax.distributed.processes import is_distributed
from cskd_jax.errors import UserError

# Name of the mapped axis over which every global batch is split.
AXIS = "devices"


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
