"""Devices and processes: the only file that names `jax.pmap`, device counts or processes."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from cskd_jax.errors import UserError

# Name of the mapped axis over which every global batch is split.
AXIS = "devices"


def describe_devices() -> dict[str, Any]:
    """What a run computes on, for its results."""
    device = jax.devices()[0]
    return {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()}


def check_batch_size(name: str, size: int) -> None:
    """Raises UserError unless a global batch of `size` splits evenly over the devices."""
    if size % jax.device_count():
        raise UserError(f"{name} is {size}, which does not divide by the {jax.device_count()} devices")


def round_up_to_devices(size: int) -> int:
    """The smallest multiple of the number of devices that is not below `size`."""
    return -(-size // jax.device_count()) * jax.device_count()


def replicate(tree: Any) -> Any:
    """Puts a tree of host or single-device arrays on every device."""
    # pmap asks for a mapped argument, to know the devices by.
    place = jax.pmap(lambda x, _: x, axis_name=AXIS, in_axes=(None, 0), out_axes=None)
    return place(tree, np.zeros(jax.local_device_count()))


def shard(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Splits the leading dimension: [B, ...] -> [devices, B / devices, ...]."""
    devices = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(devices, len(x) // devices, *x.shape[1:]), batch)


def parallel_train_step(step: Callable) -> Callable:
    """Maps `(state, teacher_variables, batch, key) -> (state, metrics)` over the devices.

    State, variables and key are the same on all devices and stay whole arrays; the batch is `shard`ed. The state is
    donated: its buffers become those of the new state.
    """
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, None, 0, None), out_axes=(None, None), donate_argnums=(0,))


def parallel_eval_step(step: Callable) -> Callable:
    """Maps `(variables, batch) -> sums` over the devices."""
    return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0), out_axes=None)


def max_steps_in_flight() -> int:
    """How many steps may be dispatched before the host waits for the oldest.

    A few keep a device busy while the host prepares what follows. CPU devices share one thread pool: with two steps in
    flight the threads of the first can all wait for a device whose turn never comes.
    """
    several_cpu_devices = jax.default_backend() == "cpu" and jax.local_device_count() > 1
    return 1 if several_cpu_devices else 4
