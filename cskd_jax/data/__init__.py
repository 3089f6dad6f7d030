"""Image data sets, decoded once and held in memory.

`load_dataset` loads one by name. Importing this package imports neither tensorflow-datasets nor TensorFlow.
"""

import functools
import os
from collections.abc import Callable

import numpy as np

from cskd_jax.data import cifar, cub200, digit_pairs, digits, image_folder, tfds_source, tiny_imagenet
from cskd_jax.data.types import ImageDataset, Split
from cskd_jax.errors import UserError

__all__ = ["DATASETS", "ImageDataset", "Split", "load_dataset"]

# A loader takes data_dir, path and train_examples by keyword. Any other name is one of tensorflow-datasets.
DATASETS: dict[str, Callable[..., ImageDataset]] = {
    "digits": functools.partial(tfds_source.load_own, digits.SOURCE),
    "digit_pairs": digit_pairs.load,
    "cifar10": functools.partial(tfds_source.load_own, cifar.CIFAR10),
    "cifar100": functools.partial(tfds_source.load_own, cifar.CIFAR100),
    "tiny_imagenet": functools.partial(tfds_source.load_own, tiny_imagenet.SOURCE),
    "cub200": functools.partial(tfds_source.load_own, cub200.SOURCE),
    "image_folder": image_folder.load,
}


def load_dataset(
    name: str, *, data_dir: str | None = None, path: str | None = None, train_examples: int | None = None
) -> ImageDataset:
    """Loads a data set into memory, preparing it on disk the first time.

    Args:
      name: A key of `DATASETS`, or any name that tensorflow-datasets knows: its features must include `image`, of one
        size, and `label`, and its splits train and test (or validation).
      data_dir: The folder of prepared data sets and downloads; None is ~/tensorflow_datasets, or what the environment
        variable TFDS_DATA_DIR says. Not used by image_folder.
      path: The folder of image_folder; not allowed for any other data set.
      train_examples: The size of a category-balanced subset of the training split: the first examples of each
        category in source order; the first categories give one more where the number does not divide. Of multi-label
        data the first examples. The same for every seed. None keeps all examples.

    Returns:
      The data set: images uint8 [N, H, W, C], labels int32 [N], or float32 [N, K] of multi-label data.

    Raises:
      UserError: The data cannot be had, is damaged or does not fit; the message says what is wrong and what is
        allowed.
    """
    data_dir = None if data_dir is None else os.path.expanduser(data_dir)
    load = DATASETS.get(name) or functools.partial(tfds_source.load_named, name, table=tuple(DATASETS))
    dataset = load(data_dir=data_dir, path=path, train_examples=train_examples)
    _check_categories(dataset)
    return dataset


def _check_categories(dataset: ImageDataset) -> None:
    if dataset.num_classes < 2:
        raise UserError(f"data set '{dataset.name}' has {dataset.num_classes} category: classification needs two")
    for split_name, split in (("train", dataset.train), ("test", dataset.test)):
        found = np.flatnonzero(split.labels.any(axis=0)) if dataset.multilabel else split.labels
        missing = np.setdiff1d(np.arange(dataset.num_classes), found)
        if len(missing):
            names = ", ".join(dataset.categories[label] for label in missing[:5])
            raise UserError(f"data set '{dataset.name}' has no image of {names} in its split {split_name}")
