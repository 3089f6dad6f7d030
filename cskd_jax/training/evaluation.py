"""Evaluation of a network on a whole split."""

from collections import deque
from typing import Any

import jax
import ml_collections
import numpy as np

from cskd_jax.data import ImageDataset, read_batches
from cskd_jax.data.augment import make_normalize
from cskd_jax.distributed import devices
from cskd_jax.training.metrics import task_of
from cskd_jax.training.networks import Network
from cskd_jax.training.step import make_eval_step


class Evaluation:
    """Evaluates a network on the whole test split: batches of one size, the last one padded and masked."""

    def __init__(self, network: Network, config: ml_collections.ConfigDict, dataset: ImageDataset):
        normalize = make_normalize(config.dataset.mean, config.dataset.std)
        self._task = task_of(dataset.multilabel)
        step = make_eval_step(network.module, preprocess=normalize, axis_name=devices.AXIS, task=self._task)
        self._step, self._split = devices.parallel_eval_step(step), dataset.test
        self._num_classes = dataset.num_classes
        # No larger than the split needs: what is padded is computed too.
        self._batch_size = min(config.batch_size, devices.round_up_to_devices(len(self._split.labels)))

    def __call__(self, variables: Any) -> dict[str, float]:
        """The metrics of the task over the whole split, each image counted once, and the mean "loss"."""
        return self._task.summarize(self.measure(variables), self._split.labels)

    def by_category(self, variables: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """See `Task.by_category`."""
        return self._task.by_category(self.measure(variables), self._split.labels, self._num_classes)

    def measure(self, variables: Any) -> list[Any]:
        """What the task measures of each batch of the split, in order, on the host."""
        pending, measured = deque(), []
        for batch in self._batches():
            pending.append(self._step(variables, batch))
            if len(pending) >= devices.max_steps_in_flight():
                measured.append(jax.device_get(pending.popleft()))
        return measured + jax.device_get(list(pending))

    def _batches(self):
        count, size = len(self._split.labels), self._batch_size
        # A process computes its rows of every batch; those behind the last image are padding.
        rows = [np.arange(start, start + size)[devices.local_rows(size)] for start in range(0, count, size)]
        indices = [index[index < count] for index in rows]
        for index, images in zip(indices, read_batches(self._split.images, indices), strict=True):
            padding = len(rows[0]) - len(index)
            batch = {
                "image": _pad(images, padding),
                "label": _pad(self._split.labels[index], padding),
                "mask": np.arange(len(rows[0])) < len(index),
            }
            yield devices.shard(batch)


def _pad(x, rows):
    return np.pad(x, [(0, rows)] + [(0, 0)] * (x.ndim - 1))
