"""Data sets made of arrays that the caller provides."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from cskd_jax.data.types import NO_LABEL, ImageDataset, Split
from cskd_jax.errors import UserError

_NAME = "arrays"


def from_arrays(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    categories: Sequence[str] | None = None,
    validation: tuple[np.ndarray, np.ndarray] | None = None,
) -> ImageDataset:
    """Returns a data set made of arrays of images and labels.

    Raises:
      UserError: The arrays are not images and labels, or those of the two splits do not fit together.
    """
    given = {"train": train, "test": test} | ({} if validation is None else {"validation": validation})
    for name, arrays in given.items():
        if not isinstance(arrays, tuple | list) or len(arrays) != 2:
            kind = f"{type(arrays).__name__}" + (f" of {len(arrays)}" if isinstance(arrays, tuple | list) else "")
            raise UserError(f"{name} must be a pair (images, labels); got {kind}")
    splits: list[Any] = [make_split(name, *arrays) for name, arrays in given.items()]
    for name, split in zip(given, splits, strict=True):  # Not for every batch that a function makes.
        if split.images.dtype != np.uint8 and not np.isfinite([split.images.min(), split.images.max()]).all():
            raise UserError(f"{name} images hold values that are not finite")
    if train[1] is None and any(split.labels.ndim == 2 for split in splits):
        raise UserError("train has no labels, but multi-label data sets need them")
    kinds = [
        f"{split.images.dtype} images {_shape_of(split.images)} with labels {_shape_of(split.labels)}"
        for split in splits
    ]
    for name, split, kind in zip(given, splits, kinds, strict=True):
        if kind != kinds[0]:
            one_hot = split.labels.ndim != splits[0].labels.ndim
            hint = "; if labels [N, K] are one-hot, give labels.argmax(1)" if one_hot else ""
            raise UserError(f"train and {name} differ: {kinds[0]}, and {kind}{hint}")
    multilabel = splits[0].labels.ndim == 2
    count = splits[0].labels.shape[1] if multilabel else 1 + max(int(split.labels.max()) for split in splits)
    names = tuple(map(str, range(count) if categories is None else categories))
    labeled = splits[1:] if np.all(splits[0].labels == NO_LABEL) else splits
    if len(names) < count or any(split.labels.min() < 0 for split in labeled):
        raise UserError(f"labels must be from 0 to {len(names) - 1}, the number of classes minus 1")
    return ImageDataset(_NAME, splits[0], splits[1], names, splits[2] if validation is not None else None)


def how_counted(data: ImageDataset) -> str:
    """Returns a hint about the number of classes if it was counted from labels, and otherwise an empty text."""
    labels, counted = data.train.labels, tuple(map(str, range(data.num_classes)))
    if data.name != _NAME or data.categories != counted or data.multilabel:
        return ""
    hint = f" (the largest label is {data.num_classes - 1}; if there are more classes, name them all in categories)"
    return hint + (", and no training image has label 0" if labels.min() > 0 else "")


def channels_first(data: ImageDataset) -> str:
    """Returns a warning about images that seem to be [N, C, H, W], and otherwise an empty text."""
    height, width, channels = data.image_shape
    if height not in (1, 3) or not width == channels > 4:
        return ""
    return (
        f"images of shape {data.image_shape} are read as height, width and channels; if the channels come first, give "
        "np.moveaxis(images, 1, -1)"
    )


def is_one_hot(labels: np.ndarray) -> bool:
    """Returns whether every row of multi-label labels [N, K] has exactly one class."""
    return bool(np.all(labels.sum(1) == 1) and np.all((labels == 0) | (labels == 1)))


def _shape_of(array):
    """Returns the shape of the images or labels of a split, whose number N may differ between splits."""
    return f"[{', '.join(map(str, ('N', *array.shape[1:])))}]"


def make_split(name: str, images: Any, labels: Any) -> Split:
    """Returns a split made of arrays; raises UserError if they are not images and labels.

    Args:
      name: Name of the split, for errors.
      images: Images [N, H, W, C], uint8 or floats, which become float32.
      labels: Labels, integers [N] or numbers [N, K]; None for a training split without labels.
    """
    try:
        images = np.asarray(images)
    except ValueError:  # It is a list of images of several sizes, or of pairs.
        raise UserError(
            f"{name} images are a {type(images).__name__} that does not form an array [N, H, W, C]"
        ) from None
    if labels is None and name != "train":
        raise UserError(f"{name} needs labels to evaluate the students with; only training images may have none")
    labels = np.full(len(images), NO_LABEL) if labels is None else np.asarray(labels)
    if images.ndim != 4 or labels.ndim not in (1, 2) or len(images) != len(labels) or not len(images):
        raise UserError(
            f"{name} must be images [N, H, W, C] and labels [N] or [N, K]; got shapes {images.shape} and {labels.shape}"
        )
    if images.dtype != np.uint8:
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(f"{name} images are {images.dtype}; they must be uint8 or floats")
        images = images.astype(np.float32)
    if labels.ndim == 2 and labels.shape[1] < 2:
        raise UserError(f"{name} labels have shape {labels.shape}; with one class per image, the shape must be [N]")
    if labels.ndim == 1 and not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{name} labels are {labels.dtype}; they must be integer class indices")
    if labels.ndim == 1 and np.any(labels.astype(np.int32) != labels):
        raise UserError(f"{name} labels are from {labels.min()} to {labels.max()}; they must be integer class indices")
    return Split(images, labels.astype(np.int32 if labels.ndim == 1 else np.float32))
