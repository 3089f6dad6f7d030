"""The devices of a run; no other file names `jax.pmap`."""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeGuard

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cskd_jax.distributed.processes import is_distributed
from cskd_jax.errors import UserError
from cskd_jax.machine import memory_left

# Name of the mapped axis over which every global batch is split.
AXIS = "devices"

# The XLA flag that sets the number of devices of a CPU.
COUNT_FLAG = "--xla_force_host_platform_device_count"
# Minimum number of images in a batch for each CPU device.
_MIN_IMAGES = 8


def make_cores_devices() -> bool:
    """Makes every core of the CPU a device, unless the user has set their number; to be called before JAX is used.

    XLA computes much of a training step with one thread for each device: gradients of convolutions, reductions, copies.

    Returns:
      Whether it did so.
    """
    config: Any = jax.config  # Its options are attributes, which type checkers do not see.
    if COUNT_FLAG in os.environ.get("XLA_FLAGS", "") or config.jax_num_cpu_devices > 0:
        return False
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    return True


def available() -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
    """Returns all devices; raises UserError if there are none of the platforms that JAX_PLATFORMS names."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError):  # Without a GPU, JAX asserts that there is one.
        config: Any = jax.config
        if not config.jax_platforms:
            raise
        raise UserError(
            f"JAX_PLATFORMS is {config.jax_platforms!r}, but JAX finds no such device; it must name platforms of this "
            "machine, such as cpu, or be empty"
        ) from None


class Devices:
    """The devices over which every batch of a run is split.

    Args:
      devices: Devices, or their number; None takes all. A run with several processes uses all.

    Raises:
      UserError: There are not that many devices.
    """

    # jax.Device is assigned where pyright cannot see that it is a class.
    def __init__(self, devices: int | Sequence[jax.Device] | None = None):  # pyright: ignore[reportInvalidTypeForm]
        # The devices of a process are consecutive.
        found = sorted(available(), key=lambda device: (device.process_index, device.id))
        devices = [devices] if isinstance(devices, jax.Device) else devices
        if isinstance(devices, int | np.integer) and not 1 <= devices <= len(found):
            raise UserError(f"devices is {devices}; it must be from 1 to {len(found)}, the number of available devices")
        if devices is None or isinstance(devices, int | np.integer):
            self._devices: list[Any] = found[:devices]
        else:
            self._devices = [*devices]
            if not self._devices or not all(isinstance(device, jax.Device) for device in self._devices):
                raise UserError(f"devices is {devices!r}; it must be a number, or devices such as jax.devices()[:2]")
        if is_distributed() and len(self._devices) != len(found):
            raise UserError("a run with several processes must use all of their devices")
        self._mesh = Mesh(np.array(self._devices), (AXIS,))

    @property
    def count(self) -> int:
        """Returns the number of devices, over all processes."""
        return len(self._devices)

    def describe(self) -> dict[str, Any]:
        """Returns the platform, kind and number of the devices and the number of processes, for a run's results."""
        device = self._devices[0]
        return {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": self.count,
            "processes": jax.process_count(),
        }

    def check_batch_size(self, name: str, size: int) -> None:
        """Raises UserError unless a global batch of `size` splits evenly over the devices."""
        if size % self.count:
            raise UserError(f"{name} is {size}, which does not split evenly across the {self.count} devices")

    def first(self, count: int) -> "Devices":
        """Returns the first `count` devices."""
        return Devices(self._devices[:count])

    def how_many_divide(self, *sizes: int) -> int:
        """Returns the largest number of devices that divides all batch sizes, if each device gets enough images."""
        most = min(self.count, sizes[0] // _MIN_IMAGES)
        return next(n for n in range(max(1, most), 0, -1) if all(size % n == 0 for size in sizes))

    def round_up(self, size: int) -> int:
        """Returns the smallest multiple of the number of devices that is not below `size`."""
        return -(-size // self.count) * self.count

    def local_rows(self, size: int) -> slice:
        """Returns the rows of a global batch of `size` that this process computes: contiguous, process by process."""
        rows = size // jax.process_count()
        return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)

    def interleave(self, size: int, micro_batch_size: int | None) -> np.ndarray:
        """Returns the rows of a global batch, ordered so that every device has its part of each micro-batch.

        Args:
          size: Size of the global batch.
          micro_batch_size: Number of rows of a micro-batch over all devices; the last one may be smaller. None keeps
            the order.
        """
        index = np.arange(size)
        if micro_batch_size is None:
            return index
        starts = range(0, len(index), micro_batch_size)
        parts = [index[start : start + micro_batch_size].reshape(self.count, -1) for start in starts]
        return np.concatenate(parts, axis=1).reshape(-1)

    def replicate(self, tree: Any) -> Any:
        """Puts a tree of arrays that are equal on all processes on every device."""
        sharding = NamedSharding(self._mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), jax.device_get(tree))

    def shard(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Returns the `local_rows` of all processes as a batch [devices, B / devices, ...], each part on its device."""
        sharding, local = NamedSharding(self._mesh, PartitionSpec(AXIS)), self.count // jax.process_count()

        def place(rows):
            rows = rows.reshape(local, len(rows) // local, *rows.shape[1:])
            return jax.make_array_from_process_local_data(sharding, rows, (self.count, *rows.shape[1:]))

        return jax.tree.map(place, batch)

    def map_teacher_pass(self, teacher_pass: Callable) -> Callable:
        """Maps `(teacher_variables, images, key, step) -> outputs` over the devices, each of which keeps its part."""
        axes = {"in_axes": (None, 0, None, None), "out_axes": 0}
        return jax.pmap(teacher_pass, axis_name=AXIS, devices=self._devices, **axes)

    def map_train_step(self, step: Callable) -> Callable:
        """Maps `(state, batch, key, teacher_layers) -> (state, metrics)` over the devices.

        Everything except the batch is the same on all devices and stays as whole arrays; the batch is `shard`ed. The
        state is donated: its buffers become those of the new state.
        """
        axes = {"in_axes": (None, 0, None, None), "out_axes": (None, None)}
        return jax.pmap(step, axis_name=AXIS, devices=self._devices, donate_argnums=(0,), **axes)

    def map_eval_step(self, step: Callable) -> Callable:
        """Maps `(variables, batch) -> sums` over the devices."""
        return jax.pmap(step, axis_name=AXIS, devices=self._devices, in_axes=(None, 0), out_axes=None)

    def free_memory(self) -> float:
        """Returns the free bytes of a device; CPU devices share the memory of the machine."""
        # Only its own process knows the memory of a device.
        local = next(device for device in self._devices if device.process_index == jax.process_index())
        stats = local.memory_stats()
        if stats and "bytes_limit" in stats:
            return stats["bytes_limit"] - stats["bytes_in_use"]
        return memory_left() / (self.count // jax.process_count())

    @functools.cached_property
    def steps_in_flight(self) -> int:
        """Returns how many steps may be dispatched before the host waits for the oldest.

        A few keep a device busy while the host prepares the next ones. CPU devices share one thread pool: with two
        steps in flight the threads of the first can all wait for a device whose turn never comes.
        """
        several_cpu_devices = self._devices[0].platform == "cpu" and self.count > 1
        return 1 if several_cpu_devices else 4


def is_requested(program: Future | None) -> TypeGuard[Future]:
    """Returns whether a program is compiled or queued; an interruption cancels what is still queued."""
    return program is not None and not program.cancelled()


def is_compiled(program: Future | None) -> bool:
    """Returns whether a program is compiled, or failed to be."""
    return is_requested(program) and program.done()


def lower(mapped: Callable, *args: Any) -> jax.stages.Lowered:
    """Traces a mapped step for arguments like these, arrays or only their shapes and types.

    The program compiled from it takes arrays that are `replicate`d and `shard`ed.
    """
    if is_distributed():
        # pmap then needs arrays, which take memory until it has traced.
        args = jax.tree.map(_zeros_for_shape, args)
    return mapped.lower(*args)


def _zeros_for_shape(x):
    is_shape = isinstance(x, jax.ShapeDtypeStruct)
    return np.broadcast_to(np.zeros((), x.dtype), x.shape) if is_shape else x
