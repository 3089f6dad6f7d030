"""The batches of a training run: taken from a split by a sampler, or made by a function of the epoch."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cskd_jax.data.samplers import BalancedSampler, UniformSampler
from cskd_jax.data.streaming import read_batches
from cskd_jax.data.types import NO_LABEL, Split
from cskd_jax.errors import UserError


class EpochBatches:
    """Batches made by a function of the epoch, in place of a split and a sampler.

    The function is called anew for every epoch. A resumed run calls it for the interrupted epoch and skips the batches
    that were already trained on: it resumes exactly if the same epoch always gives the same batches.

    Args:
      function: Function from the number of an epoch, from 0, to an iterable of (images, labels).
      convert: Function that converts images and labels for training; raises UserError if they are invalid.
      steps_per_epoch: Number of batches of an epoch, all of one size. None counts the batches of epoch 0, the last of
        which may be smaller; this reads them all one extra time.

    Attributes:
      first: First batch of epoch 0.
      batch_size: Number of images in a batch.
      last_batch_size: Number of images in the last batch of an epoch.
      steps_per_epoch: Number of batches of an epoch.
      num_examples: Number of images in an epoch.
      num_classes: Number of classes that labels are checked against, to be set before `read`; None disables the check.

    Raises:
      UserError: The function gives no batches, or batches that differ in anything but the size of the last one,
        or `steps_per_epoch` is not a positive integer.
    """

    def __init__(
        self,
        function: Callable[[int], Any],
        convert: Callable[[Any, Any], Split],
        steps_per_epoch: int | None = None,
    ):
        is_number = isinstance(steps_per_epoch, int | np.integer) and not isinstance(steps_per_epoch, bool)
        if steps_per_epoch is not None and (not is_number or steps_per_epoch < 1):
            raise UserError(f"steps_per_epoch is {steps_per_epoch!r}; it must be a positive integer, or None")
        self._function, self._convert, self._is_counted = function, convert, steps_per_epoch is None
        self.num_classes: int | None = None
        batches = self._epoch(0)
        first = next(batches, None)
        if first is None:
            raise UserError("train yields no batches for epoch 0")
        self.first, self.batch_size = first, len(first.labels)
        sizes = [self.batch_size]
        if steps_per_epoch is None:
            sizes += [len(batch.labels) for batch in batches]
        self.last_batch_size, self.steps_per_epoch = sizes[-1], steps_per_epoch or len(sizes)
        if any(size != self.batch_size for size in sizes[:-1]) or self.last_batch_size > self.batch_size:
            raise UserError(f"train yields batches of {sorted(set(sizes))} images; only the last may be smaller")
        self.num_examples = self.images_before(self.steps_per_epoch)

    def images_before(self, step: int) -> int:
        """Returns how many images the steps before `step` have trained on."""
        return step * self.batch_size - step // self.steps_per_epoch * (self.batch_size - self.last_batch_size)

    def read(self, steps: range) -> Iterator[Split]:
        """Yields the batches of consecutive steps.

        Raises:
          UserError: An epoch has fewer batches than it should, or batches of different shapes.
        """
        position = steps.start
        while position < steps.stop:
            epoch, done = divmod(position, self.steps_per_epoch)
            end = min(steps.stop, (epoch + 1) * self.steps_per_epoch)
            for batch in itertools.islice(self._epoch(epoch), done, done + end - position):
                self._check(batch, position)
                yield batch
                position += 1
            if position < end:
                found = f"train yields {position - epoch * self.steps_per_epoch} batches for epoch {epoch}"
                wanted = self.steps_per_epoch
                raise UserError(
                    f"{found}, but {wanted} for epoch 0: the function must make new ones every time it is called"
                    if self._is_counted
                    else f"{found}, but steps_per_epoch is {wanted}: lower it, or yield more"
                )

    def _epoch(self, epoch):
        for batch in self._function(epoch):
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise UserError(f"train yields a {type(batch).__name__}; it must yield pairs (images, labels)")
            yield self._convert(*batch)

    def _check(self, batch, step):
        has_labels = self.first.labels.max() != NO_LABEL
        if (
            has_labels
            and self.num_classes is not None
            and not 0 <= batch.labels.min() <= batch.labels.max() < self.num_classes
        ):
            raise UserError(f"train yields a label at step {step + 1} that is not from 0 to {self.num_classes - 1}")
        is_last = (step + 1) % self.steps_per_epoch == 0
        size = self.last_batch_size if is_last else self.batch_size
        given: tuple[Any, ...] = (*batch,)
        first: tuple[Any, ...] = (*self.first,)
        found = [(array.shape, array.dtype) for array in given]
        wanted = [((size, *array.shape[1:]), array.dtype) for array in first]
        if found != wanted:
            texts = [", ".join(f"{dtype}{list(shape)}" for shape, dtype in kinds) for kinds in (found, wanted)]
            raise UserError(
                f"train yields images and labels {texts[0]} at step {step + 1}, not {texts[1]} as in epoch 0"
            )


Sampler = UniformSampler | BalancedSampler | EpochBatches


def read_steps(
    split: Split, sampler: Sampler, steps: range, rows: Callable[[int], np.ndarray]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Yields (size of the global batch, this process's part of it) for consecutive steps.

    Args:
      split: Training split; not read if the sampler makes the batches itself.
      sampler: Sampler that decides which images make up a batch.
      steps: Steps.
      rows: Function from the size of a global batch to the rows that make up this process's part, in order.

    Yields:
      The part is {"image", "label", "index": int32, positions in the training split}; without "index" if the sampler
      makes the batches itself.
    """
    if isinstance(sampler, EpochBatches):
        for batch in sampler.read(steps):
            size = len(batch.labels)
            part = rows(size)
            yield size, {"image": batch.images[part], "label": batch.labels[part]}
        return

    def part_of(step):
        index = sampler.indices(step)
        return len(index), index[rows(len(index))]

    # Images may be read ahead of the steps that take them.
    parts, ahead = itertools.tee(map(part_of, steps))
    batches = read_batches(split.images, (index for _, index in ahead))
    for (size, index), images in zip(parts, batches, strict=True):
        yield size, {"image": images, "label": split.labels[index], "index": index.astype(np.int32)}
