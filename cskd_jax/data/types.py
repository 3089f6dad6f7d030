"""The loaded data set, and the choice of a smaller training split."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cskd_jax.data.streaming import ImageStream
from cskd_jax.errors import UserError

# The label of every image of a training split that has no labels.
NO_LABEL = -1


class Split(NamedTuple):
    """Images and their labels.

    Attributes:
      images: Images, uint8 [N, H, W, C]: an array, a reader that decodes them when they are requested
        (`images.Reader`), or, once the data set is loaded, a stream of them (`streaming.ImageStream`).
      labels: Labels, int32 [N], indices into the classes of the data set, or all `NO_LABEL`; or, where an image has any
        number of classes (multi-label), float32 [N, K], with 1 for each class of an image and 0 for the others.
    """

    images: np.ndarray | ImageStream | Any  # Any stands for a Reader, which only the loaders see.
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """A classification data set.

    Attributes:
      name: Name by which it was loaded.
      train: Training split, in source order.
      test: Test split, in source order, with images of the same shape.
      categories: Names of the classes, by label.
      validation: Part of the training split that is not trained on but used to choose the best epoch; None if the test
        split is used for that.
      official: Whether it was prepared from the official archive; None if that is not known, or if there is none.
    """

    name: str
    train: Split
    test: Split
    categories: tuple[str, ...]
    validation: Split | None = None
    official: bool | None = None

    @property
    def num_classes(self) -> int:
        """Returns the number K of classes."""
        return len(self.categories)

    @property
    def multilabel(self) -> bool:
        """Returns whether an image may have any number of classes instead of exactly one."""
        return self.train.labels.ndim == 2

    @property
    def unlabeled(self) -> bool:
        """Returns whether the training images have no labels, so students learn only from a teacher's outputs."""
        labels = self.train.labels
        return labels.ndim == 1 and len(labels) > 0 and bool(np.all(labels == NO_LABEL))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Returns the shape of one image, (H, W, C)."""
        return self.train.images.shape[1:]

    @property
    def image_dtype(self) -> np.dtype:
        """Returns the dtype of a pixel: uint8, or the dtype of float arrays that the caller provided."""
        return getattr(self.train.images, "dtype", np.dtype(np.uint8))


def hold_out(dataset: ImageDataset, examples: int, seed: int) -> ImageDataset:
    """Returns the data set with part of its training split as the validation split.

    Args:
      dataset: Data set whose images are arrays or readers.
      examples: Size of that part: as many examples of each class as `balanced_indices` would choose, drawn at random.
      seed: Seed of the draw.

    Raises:
      UserError: A class does not have enough examples, at least one of which must remain for training.
    """
    if dataset.unlabeled:
        raise UserError(
            f"data set '{dataset.name}' has training images without labels, which cannot be held out for validation: "
            "leave out validation_examples"
        )
    split = dataset.train
    order = np.random.default_rng(seed).permutation(len(split.labels))
    chosen = balanced_indices(split.labels[order], dataset.categories, examples, "validation_examples", kept=1)
    parts = [np.sort(order[chosen]), np.sort(np.delete(order, chosen))]
    validation, train = (Split(_select(split.images, part), split.labels[part]) for part in parts)
    return dataclasses.replace(dataset, train=train, validation=validation)


def _select(images, index):
    return images[index] if isinstance(images, np.ndarray) else images.select(index)


def balanced_indices(
    labels: np.ndarray,
    categories: Sequence[str],
    train_examples: int | None,
    name: str = "train_examples",
    *,
    kept: int = 0,
) -> np.ndarray:
    """Chooses the first examples of each class, as evenly as `train_examples` allows.

    With K classes, each one contributes its first `train_examples // K` examples, and the first `train_examples % K`
    classes contribute one more. There is no randomness: the same data and number always give the same subset. Examples
    of several classes, or of none, cannot be balanced like this: for such data, the first `train_examples` are taken.

    Args:
      labels: Labels of the whole training split in source order, int [N] or float [N, K].
      categories: Names of the K classes.
      train_examples: Size of the subset; None keeps everything.
      name: Name of this size in error messages.
      kept: Number of examples of each class, or of all if they cannot be balanced, that must not be chosen.

    Returns:
      Increasing indices into `labels`, int64 [train_examples].

    Raises:
      UserError: If a class has too few examples, or if `train_examples` is smaller than K.
    """
    if train_examples is None:
        return np.arange(len(labels))
    if labels.ndim == 2 or np.all(labels == NO_LABEL):
        if not 1 <= train_examples <= len(labels) - kept:
            raise UserError(f"{name}={train_examples} is out of range; it must be from 1 to {len(labels) - kept}")
        return np.arange(train_examples)
    counts = np.bincount(labels, minlength=len(categories))
    available = np.maximum(counts - kept, 0)
    share, remainder = divmod(train_examples, len(categories))
    if share < 1:
        raise UserError(
            f"{name}={train_examples} is less than the number of classes, {len(categories)}; "
            f"it must be from {len(categories)} to {_largest_subset(available)}"
        )
    wanted = np.full(len(categories), share)
    wanted[:remainder] += 1
    short = np.flatnonzero(available < wanted)
    if short.size:
        first = short[0]
        remaining = f", and {kept} must remain" if kept else ""
        raise UserError(
            f"{name}={train_examples} needs {wanted[first]} training examples of class "
            f"'{categories[first]}', which has {counts[first]}{remaining}: "
            f"at most {_largest_subset(available)} are possible"
        )
    chosen = [np.flatnonzero(labels == category)[:count] for category, count in enumerate(wanted)]
    return np.sort(np.concatenate(chosen))


def _largest_subset(available: np.ndarray) -> int:
    """Returns the largest `train_examples` that the counts of the classes allow."""
    smallest = int(available.min())
    # One more from each of the first classes, up to the first class that has none left.
    return smallest * len(available) + int(np.argmax(available == smallest))
