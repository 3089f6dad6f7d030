"""Samplers: the examples of each step's batch, as a pure function of (seed, step), so that resuming needs no state."""

import dataclasses
import functools

import numpy as np

from cskd_jax.errors import UserError


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch)).permutation(num_examples)
    order.setflags(write=False)  # Callers get slices of the cached array.
    return order


@dataclasses.dataclass(frozen=True)
class UniformSampler:
    """A sampler that yields every example once per epoch, in a new random order for each epoch.

    Attributes:
      num_examples: Size of the training split.
      batch_size: Size of the global batch.
      seed: Seed of the order.
      drop_last: Whether to leave out the last, smaller batch of an epoch; otherwise it is kept, as PyTorch's loader
        does.
    """

    num_examples: int
    batch_size: int
    seed: int
    drop_last: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Returns the number of optimization steps in an epoch."""
        if self.drop_last:
            return self.num_examples // self.batch_size
        return -(-self.num_examples // self.batch_size)

    @property
    def last_batch_size(self) -> int:
        """Returns the size of the last batch of an epoch."""
        return self.batch_size if self.drop_last else (self.num_examples - 1) % self.batch_size + 1

    def images_before(self, step: int) -> int:
        """Returns the number of images that the steps before `step` have trained on."""
        epochs, position = divmod(step, self.steps_per_epoch)
        per_epoch = (self.steps_per_epoch - 1) * self.batch_size + self.last_batch_size
        return epochs * per_epoch + position * self.batch_size

    def indices(self, step: int) -> np.ndarray:
        """Returns the training examples of the global batch of `step`, int64 [batch_size] or [last_batch_size]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.seed, epoch, self.num_examples)
        return order[position * self.batch_size : (position + 1) * self.batch_size]


class BalancedSampler:
    """A sampler of batches of P classes with K examples of each, where P times K is the batch size.

    A uniform batch of 128 over 100 classes leaves about 36 examples alone in their class, where they say nothing about
    the structure within it. Here every example is accompanied by K - 1 others of its class.

    In each epoch the examples of every class are shuffled and dealt into groups of K, and each batch takes the groups
    of P different classes: those with the most groups left, with ties broken at random. An epoch ends when no such
    batch is left. The examples that are left over (fewer than K examples of a class, or groups of too few classes)
    differ from epoch to epoch, so that all examples are used in the long run.

    Args:
      labels: Labels of the training split, int [N].
      batch_size: Size of the global batch.
      samples_per_category: Number K of examples of a class, a divisor of batch_size.
      seed: Seed of all draws.

    Attributes:
      num_examples: Size N of the training split.
      batch_size: Size of the global batch, P times K.
      steps_per_epoch: Number of batches in an epoch, as many as possible.
      last_batch_size: Size of the last batch of an epoch, equal to batch_size.

    Raises:
      UserError: If K does not divide the batch size, or if fewer than P classes have K examples.
    """

    def __init__(self, labels: np.ndarray, batch_size: int, samples_per_category: int, seed: int):
        self.num_examples, self.batch_size, self.last_batch_size = len(labels), batch_size, batch_size
        self._size, self._seed = samples_per_category, seed
        self._categories_per_batch, rest = divmod(batch_size, samples_per_category)
        if rest:
            raise UserError(f"batch_size {batch_size} is not divisible by sampler.samples_per_category {self._size}")
        self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        groups = np.array([len(members) // self._size for members in self._members])
        if np.count_nonzero(groups) < self._categories_per_batch:
            raise UserError(
                f"a batch of {batch_size} with {self._size} examples per class needs {self._categories_per_batch} "
                f"classes with that many examples, but the training split has {np.count_nonzero(groups)}"
            )
        # S batches can be filled if and only if there are at least S times P groups, where each class counts at most S,
        # one for each batch.
        steps = np.arange(1, groups.sum() // self._categories_per_batch + 1)
        filled = [np.minimum(groups, step).sum() >= step * self._categories_per_batch for step in steps]
        self.steps_per_epoch = int(steps[filled][-1])
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def images_before(self, step: int) -> int:
        """Returns the number of images that the steps before `step` have trained on."""
        return step * self.batch_size

    def indices(self, step: int) -> np.ndarray:
        """Returns the training examples of the global batch of `step`, shuffled, int64 [batch_size]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[position]

    def _make_epoch(self, epoch):
        generator = np.random.default_rng((self._seed, epoch))
        groups = []
        for members in self._members:
            count = len(members) // self._size
            groups.append(generator.permutation(members)[: count * self._size].reshape(count, self._size))
        left = np.array([len(group) for group in groups])
        batches = np.empty((self.steps_per_epoch, self.batch_size), np.int64)
        for batch in batches:
            # The classes are sorted by the number of groups left, most first, with ties in random order.
            chosen = np.lexsort((generator.random(len(left)), -left))[: self._categories_per_batch]
            left[chosen] -= 1
            # Shuffled so that the devices that share the batch get samples of all its classes.
            batch[:] = generator.permutation(np.concatenate([groups[c][left[c]] for c in chosen]))
        batches.setflags(write=False)
        return batches
