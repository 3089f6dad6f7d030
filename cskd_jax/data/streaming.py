"""Images that do not fit in memory: other processes decode the batches that are needed next."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from cskd_jax.data.images import Reader
from cskd_jax.errors import UserError


class Workers:
    """Processes that decode, each of which knows all of the readers; they start when the first batch is asked for.

    Args:
      readers: of a data set.
      count: of processes.
    """

    def __init__(self, readers: Sequence[Reader], count: int):
        self.count, self._readers, self._pool = count, tuple(readers), None

    def submit(self, reader: Reader, index: np.ndarray) -> concurrent.futures.Future:
        """Starts `reader.read(index)` in one of the processes."""
        if self._pool is None:
            # Not forked: the threads of JAX would not be, and what they hold locked would stay locked.
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.count, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(self._readers,)
            )
        try:
            return self._pool.submit(_read, self._readers.index(reader), index)
        except concurrent.futures.BrokenExecutor as error:
            raise _killed() from error


class ImageStream:
    """What stands in the place of an array of images where it would not fit in memory.

    Args:
      reader: decodes the images.
      workers: to which the reader is known.

    Attributes:
      shape: (N, H, W, C).
    """

    def __init__(self, reader: Reader, workers: Workers):
        self.shape, self._reader, self._workers = reader.shape, reader, workers

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """The images at `index`, uint8 [n, H, W, C], decoded here and now."""
        return self._reader.read(np.arange(len(self))[index])

    def __len__(self):
        return self.shape[0]

    def batches(self, indices: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """See `read_batches`."""
        ahead = deque()
        try:
            for index in indices:
                ahead.append(self._workers.submit(self._reader, index))
                # One for each worker, and one that is done when the loop comes for it.
                if len(ahead) > self._workers.count + 1:
                    yield _result(ahead.popleft())
            while ahead:
                yield _result(ahead.popleft())
        finally:
            for future in ahead:
                future.cancel()


def read_batches(images: np.ndarray | ImageStream, indices: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The batches images[index], uint8 [n, H, W, C], for each index, int [n], of `indices`, in their order.

    Those of a stream are decoded ahead of being asked for, as many as there are workers.

    Raises:
      UserError: an image of a stream cannot be read.
    """
    if isinstance(images, ImageStream):
        return images.batches(indices)
    return (images[index] for index in indices)


def _result(future):
    try:
        return future.result()
    except concurrent.futures.BrokenExecutor as error:
        raise _killed() from error


def _killed():
    return UserError("a process that decodes images was killed, perhaps for lack of memory: lower dataset.workers")


# In a worker: what it decodes with.
_readers: tuple[Reader, ...] = ()


def _start_worker(readers):
    global _readers
    _readers = readers
    # What stops a run is for the run to handle; it may still want batches. A worker ends with it, however it ends.
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _read(number, index):
    return _readers[number].read(index)
