"""Which examples make up the batch of a step: a pure function of (seed, step), so that resuming needs no state."""

import dataclasses
import functools

import numpy as np


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch)).permutation(num_examples)
    order.setflags(write=False)  # Slices of it are handed out.
    return order


@dataclasses.dataclass(frozen=True)
class UniformSampler:
    """Every example once an epoch, in an order drawn anew for each epoch.

    Attributes:
      num_examples: in the training split.
      batch_size: of the global batch.
      seed: of the order.
      drop_last: leave out the last, smaller batch of an epoch; otherwise it is kept, as PyTorch's loader does.
    """

    num_examples: int
    batch_size: int
    seed: int
    drop_last: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Optimization steps in an epoch."""
        if self.drop_last:
            return self.num_examples // self.batch_size
        return -(-self.num_examples // self.batch_size)

    @property
    def last_batch_size(self) -> int:
        """Size of the last batch of an epoch."""
        return self.batch_size if self.drop_last else (self.num_examples - 1) % self.batch_size + 1

    def images_before(self, step: int) -> int:
        """How many images the steps before `step` have trained on."""
        epochs, position = divmod(step, self.steps_per_epoch)
        per_epoch = (self.steps_per_epoch - 1) * self.batch_size + self.last_batch_size
        return epochs * per_epoch + position * self.batch_size

    def indices(self, step: int) -> np.ndarray:
        """Positions in the training split of the global batch of `step`, int64 [batch_size] or [last_batch_size]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.seed, epoch, self.num_examples)
        return order[position * self.batch_size : (position + 1) * self.batch_size]
