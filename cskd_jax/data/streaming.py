"""Images that do not fit in memory: other processes decode the batches that are needed next."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker

import numpy as np

from cskd_jax.data.images import Reader
from cskd_jax.errors import LostWorkerError


class Workers:
    """Processes that decode; they start when the first batch is asked for.

    Args:
      count: of processes.
    """

    def __init__(self, count: int):
        self.count, self._pool = count, None

    def submit(self, reader: Reader) -> concurrent.futures.Future:
        """Starts `reader.read()` in one of the processes."""
        if self._pool is not None:
            return self._pool.submit(reader.read)
        # Not forked: the threads of JAX would not be, and what they hold locked would stay locked.
        self._pool = concurrent.futures.ProcessPoolExecutor(
            self.count, multiprocessing.get_context("spawn"), initializer=_end_with_parent
        )
        # What stops a run is for the run to handle, which may still want batches: the processes are born deaf to it.
        resource_tracker.ensure_running()  # It would hear again in between.
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            return self._pool.submit(reader.read)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)


class ImageStream:
    """What stands in the place of an array of images where it would not fit in memory.

    Args:
      reader: of the images.
      workers: decode them.

    Attributes:
      shape: (N, H, W, C).
    """

    def __init__(self, reader: Reader, workers: Workers):
        self.shape, self._reader, self._workers = reader.shape, reader, workers

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """The images at `index`, uint8 [n, H, W, C], decoded here and now."""
        return self._reader.select(np.arange(len(self))[index]).read()

    def __len__(self):
        return self.shape[0]

    def batches(self, indices: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """See `read_batches`."""
        ahead = deque()
        try:
            for index in indices:
                ahead.append(self._workers.submit(self._reader.select(index)))
                # One for each worker, and one that is done when the loop comes for it.
                if len(ahead) > self._workers.count + 1:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except concurrent.futures.BrokenExecutor as error:
            raise LostWorkerError(
                "a process that decodes images was killed, perhaps for lack of memory (fewer dataset.workers need "
                "less): the same command goes on from the last checkpoint"
            ) from error
        finally:
            for future in ahead:
                future.cancel()


def read_batches(images: np.ndarray | ImageStream, indices: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The batches images[index], uint8 [n, H, W, C], for each index, int [n], of `indices`, in their order.

    Those of a stream are decoded ahead of being asked for, as many as there are workers.

    Raises:
      UserError: an image of a stream cannot be read.
      LostWorkerError: a process that decodes was killed.
    """
    if isinstance(images, ImageStream):
        return images.batches(indices)
    return (images[index] for index in indices)


def _end_with_parent():
    """In a worker: it ends when the run ends, however that is."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
