"""Evaluation of a network on a whole split."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import jax
import numpy as np

from cskd_jax.data import Split, read_batches
from cskd_jax.distributed.devices import AXIS, Devices, is_requested, lower
from cskd_jax.training.metrics import Task, task_of
from cskd_jax.training.networks import Network
from cskd_jax.training.step import make_eval_step


class Evaluation:
    """Evaluation of a network on a whole split, in batches of one size, with the last one padded and masked.

    Args:
      network: Network.
      split: Images and labels.
      num_classes: Number of classes.
      normalize: Function from images of the split to inputs of the network.
      batch_size: Size of a batch over all devices; smaller if the split is.
      devices: Devices to compute on.
    """

    def __init__(
        self,
        network: Network,
        split: Split,
        num_classes: int,
        *,
        normalize: Callable[[jax.Array], jax.Array],
        batch_size: int,
        devices: Devices,
    ):
        self._task, self._split, self._num_classes = task_of(split.labels.ndim == 2), split, num_classes
        step = make_eval_step(network.on_axis(AXIS), preprocess=normalize, axis_name=AXIS, task=self._task)
        self._step, self.devices = devices.map_eval_step(step), devices
        self._compiled: Future | None = None
        # No larger than the split needs, since padding costs computation.
        self._batch_size = min(batch_size, devices.round_up(len(split.labels)))

    def compile(self, variables: Any, pool: Executor) -> None:
        """Compiles the evaluation in the background, ahead of the first call.

        Args:
          variables: Variables of the network, or their shapes.
          pool: Executor that runs the compiler.
        """
        if not is_requested(self._compiled):
            self._compiled = pool.submit(lower(self._step, variables, next(self._batches())).compile)

    @property
    def task(self) -> Task:
        """Returns the task that defines the metrics."""
        return self._task

    def __call__(self, variables: Any) -> dict[str, float]:
        """Returns the metrics of the task and the mean "loss" over the split, with each image counted once."""
        return self._task.summarize(self._measure(variables), self._split.labels)

    def by_category(self, variables: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the score of each class, and the confusion matrix; see `Task.by_category`."""
        return self._task.by_category(self._measure(variables), self._split.labels, self._num_classes)

    def all(self, variables: Any) -> tuple[dict[str, float], np.ndarray, np.ndarray | None]:
        """Returns the results of both `__call__` and `by_category` from one pass."""
        measured, labels = self._measure(variables), self._split.labels
        return self._task.summarize(measured, labels), *self._task.by_category(measured, labels, self._num_classes)

    def _measure(self, variables):
        """Returns the measurements of the task for each batch of the split, in order, on the host."""
        pending, measured = deque(), []
        step = self._compiled.result() if is_requested(self._compiled) else self._step
        for batch in self._batches():
            pending.append(step(variables, batch))
            if len(pending) >= self.devices.steps_in_flight:
                measured.append(jax.device_get(pending.popleft()))
        return measured + jax.device_get(list(pending))

    def _batches(self):
        count, size = len(self._split.labels), self._batch_size
        # Each process computes its own rows of every batch; rows after the last image are padding.
        local = self.devices.local_rows(size)
        rows = [np.arange(start, start + size)[local] for start in range(0, count, size)]
        indices = [index[index < count] for index in rows]
        for index, images in zip(indices, read_batches(self._split.images, indices), strict=True):
            padding = len(rows[0]) - len(index)
            batch = {
                "image": _pad(images, padding),
                "label": _pad(self._split.labels[index], padding),
                "mask": np.arange(len(rows[0])) < len(index),
            }
            yield self.devices.shard(batch)


def _pad(x, rows):
    return np.pad(x, [(0, rows)] + [(0, 0)] * (x.ndim - 1))
