"""Streams of images that do not fit in memory; other processes decode the batches that are needed next."""

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
from cskd_jax.errors import TransientError


class Workers:
    """Processes that decode images; they start when the first batch is requested.

    Args:
      count: Number of processes.

    Attributes:
      have_decoded: Whether they have decoded a batch.
    """

    def __init__(self, count: int):
        self.count, self.have_decoded, self._pool = count, False, None

    def submit(self, reader: Reader) -> concurrent.futures.Future:
        """Starts `reader.read()` in one of the processes."""
        if self._pool is not None:
            return self._pool.submit(reader.read)
        # A fork would copy the locks that JAX's threads hold, but not the threads, so nobody would release the locks.
        self._pool = concurrent.futures.ProcessPoolExecutor(
            self.count, multiprocessing.get_context("spawn"), initializer=_end_with_parent
        )
        # Only the run itself handles signals that stop it, because it may still need batches; the worker processes
        # start with these signals blocked. The resource tracker unblocks them when it starts, so it starts first.
        resource_tracker.ensure_running()
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            return self._pool.submit(reader.read)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)

    def restart(self) -> None:
        """Makes the next request start new processes, because some of these were killed."""
        self._pool = None


class ImageStream:
    """A stream that takes the place of an array of images that would not fit in memory.

    Args:
      reader: Reader of the images.
      workers: Processes that decode them.

    Attributes:
      shape: Shape of all images together, (N, H, W, C).
    """

    def __init__(self, reader: Reader, workers: Workers):
        self.shape, self._reader, self._workers = reader.shape, reader, workers

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """Returns the images at `index`, uint8 [n, H, W, C], decoded in this process."""
        return self._reader.select(np.arange(len(self))[index]).read()

    def __len__(self):
        return self.shape[0]

    def batches(self, indices: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yields the images at each index, decoded ahead by the workers; raises TransientError if one was killed."""
        ahead = deque()
        try:
            for index in indices:
                ahead.append(self._workers.submit(self._reader.select(index)))
                # One batch for each worker, and one that is ready when the loop asks for it.
                if len(ahead) > self._workers.count + 1:
                    yield self._decoded(ahead.popleft())
            while ahead:
                yield self._decoded(ahead.popleft())
        except concurrent.futures.BrokenExecutor as error:
            self._workers.restart()
            if self._workers.have_decoded:
                raise TransientError(
                    "a process that decodes images was killed, perhaps for lack of memory (fewer dataset.workers need "
                    "less): the same command resumes from the last checkpoint"
                ) from error
            raise TransientError(
                "the processes that decode images ended before the first batch: for lack of memory (fewer "
                "dataset.workers need less), or because they run the script that started them, whose statements must "
                "be within `if __name__ == '__main__':`"
            ) from error
        finally:
            for future in ahead:
                future.cancel()

    def _decoded(self, future):
        batch = future.result()
        self._workers.have_decoded = True
        return batch


def read_batches(images: np.ndarray | ImageStream, indices: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Iterates over the batches images[index], uint8 [n, H, W, C], for each index, int [n], of `indices`.

    The batches come in the order of `indices`. The batches of a stream are decoded ahead of time, as many as there are
    workers.

    Raises:
      UserError: If an image of a stream cannot be read.
      TransientError: If a decoding process was killed.
    """
    if isinstance(images, ImageStream):
        return images.batches(indices)
    return (images[index] for index in indices)


def _end_with_parent():
    """Makes a worker exit when the run ends, however it ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker has a parent"

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
