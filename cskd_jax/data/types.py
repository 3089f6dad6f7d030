"""What a data set is once it is loaded, and how a smaller training split is chosen."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cskd_jax.data.images import Reader
from cskd_jax.data.streaming import ImageStream
from cskd_jax.errors import UserError


class Split(NamedTuple):
    """Images and their labels.

    Attributes:
      images: uint8 [N, H, W, C]: an array, what decodes them when they are asked for (`images.Reader`), or, once it is
        loaded, a stream of them (`streaming.ImageStream`).
      labels: int32 [N], indices into the categories of the data set; or, where an image has any number of categories
        (multi-label), float32 [N, K], 1 for each category of an image and 0 for the others.
    """

    images: np.ndarray | Reader | ImageStream
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """A classification data set.

    Attributes:
      name: The name that it was loaded by.
      train: The training split, in source order.
      test: The test split, in source order, with images of the same shape.
      categories: The name of each category, by label.
      validation: Part of the training split that is not trained on but chooses the best epoch; None where the test
        split does.
    """

    name: str
    train: Split
    test: Split
    categories: tuple[str, ...]
    validation: Split | None = None

    @property
    def num_classes(self) -> int:
        """The number of categories, K."""
        return len(self.categories)

    @property
    def multilabel(self) -> bool:
        """Whether an image has any number of categories instead of one."""
        return self.train.labels.ndim == 2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of one image, (H, W, C)."""
        return self.train.images.shape[1:]

    @property
    def image_dtype(self) -> np.dtype:
        """The type of a pixel: uint8, but for arrays of floats of one's own."""
        return getattr(self.train.images, "dtype", np.dtype(np.uint8))


def hold_out(dataset: ImageDataset, examples: int, seed: int) -> ImageDataset:
    """Returns the data set with a part of its training split as validation split.

    Args:
      dataset: Data set whose images are arrays or readers.
      examples: Size of the part: as many examples of each class as `balanced_indices` gives, drawn at random.
      seed: Seed of the draw.

    Raises:
      UserError: There are not so many examples of a class.
    """
    split = dataset.train
    order = np.random.default_rng(seed).permutation(len(split.labels))
    chosen = balanced_indices(split.labels[order], dataset.categories, examples, "validation_examples")
    parts = [np.sort(order[chosen]), np.sort(np.delete(order, chosen))]
    validation, train = (Split(_select(split.images, part), split.labels[part]) for part in parts)
    return dataclasses.replace(dataset, train=train, validation=validation)


def _select(images: np.ndarray | Reader, index: np.ndarray) -> np.ndarray | Reader:
    return images[index] if isinstance(images, np.ndarray) else images.select(index)


def balanced_indices(
    labels: np.ndarray, categories: Sequence[str], train_examples: int | None, name: str = "train_examples"
) -> np.ndarray:
    """Chooses the first examples of each category, as evenly as `train_examples` allows.

    With K categories, each one gives its first `train_examples // K` examples, and the first `train_examples % K`
    categories give one more. There is no randomness: the same data and number always give the same subset. Examples of
    several categories cannot be balanced like that: of multi-label data the first `train_examples` are taken.

    Args:
      labels: int [N] or float [N, K], the labels of the whole training split in source order.
      categories: The K category names.
      train_examples: The size of the subset; None keeps everything.
      name: What errors call this size.

    Returns:
      int64 [train_examples], increasing indices into `labels`.

    Raises:
      UserError: A category holds too few examples, or `train_examples` is smaller than K.
    """
    if train_examples is None:
        return np.arange(len(labels))
    if labels.ndim == 2:
        if not 1 <= train_examples <= len(labels):
            raise UserError(f"{name}={train_examples} is out of range: allowed are 1 to {len(labels)}")
        return np.arange(train_examples)
    share, remainder = divmod(train_examples, len(categories))
    if share < 1:
        raise UserError(
            f"{name}={train_examples} is fewer than the {len(categories)} categories: "
            f"allowed are {len(categories)} to {len(labels)}"
        )
    wanted = np.full(len(categories), share)
    wanted[:remainder] += 1
    available = np.bincount(labels, minlength=len(categories))
    short = np.flatnonzero(available < wanted)
    if short.size:
        first = short[0]
        raise UserError(
            f"{name}={train_examples} needs {wanted[first]} training examples of category "
            f"'{categories[first]}', which has {available[first]}: at most {_largest_subset(available)} are possible"
        )
    chosen = [np.flatnonzero(labels == category)[:count] for category, count in enumerate(wanted)]
    return np.sort(np.concatenate(chosen))


def _largest_subset(available: np.ndarray) -> int:
    """The largest `train_examples` that the counts per category allow."""
    smallest = int(available.min())
    # One more from each of the first categories, up to the first that has no more to give.
    return smallest * len(available) + int(np.argmax(available == smallest))
