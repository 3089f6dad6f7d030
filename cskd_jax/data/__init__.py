"""Image data sets, decoded once and held in memory or, where they would not fit, streamed.

`load_dataset` loads a data set by name. Importing this package imports neither tensorflow-datasets nor TensorFlow.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from cskd_jax.data import cifar, cub200, digit_pairs, digits, image_folder, tfds_source, tiny_imagenet
from cskd_jax.data.streaming import ImageStream, Workers, read_batches
from cskd_jax.data.tfds_source import NotPreparedError
from cskd_jax.data.types import ImageDataset, Split, hold_out
from cskd_jax.errors import UserError
from cskd_jax.files import local_folder
from cskd_jax.machine import total_memory

__all__ = ["DATASETS", "ImageDataset", "NotPreparedError", "Split", "load_dataset", "read_batches"]

# A loader takes data_dir, path, train_examples and image_size by keyword. Any other name refers to tensorflow-datasets.
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
    name: str,
    *,
    data_dir: str | None = None,
    path: str | None = None,
    train_examples: int | None = None,
    validation_examples: int | None = None,
    validation_seed: int = 0,
    image_size: int | None = None,
    exif_orientation: bool = True,
    streaming: bool | None = None,
    workers: int | None = None,
    prepare: bool = True,
) -> ImageDataset:
    """Loads a data set, preparing it on disk the first time.

    Args:
      name: Name of the data set, a key of `DATASETS` or any name that tensorflow-datasets knows. Its features must then
        include `image` and `label`, and its splits train and test (or validation).
      data_dir: Folder of prepared data sets and downloads; None means the folder in the environment variable
        TFDS_DATA_DIR, or else ~/tensorflow_datasets. It is not used by image_folder and digit_pairs.
      path: Folder of image_folder; not allowed for any other data set.
      train_examples: Size of a class-balanced subset of the training split, as `balanced_indices` chooses it, the same
        for every seed. None keeps all examples.
      validation_examples: Size of the validation split, drawn at random, class by class, from these examples, which are
        then not used for training. None makes no validation split.
      validation_seed: Seed of that draw.
      image_size: Side of the squares to which images of any size are converted (`images.middle_square`). None leaves
        them unchanged, and then all must have the same size.
      exif_orientation: Whether the images of image_folder are rotated according to their EXIF data.
      streaming: Whether the images are decoded batch by batch instead of once into memory; the bytes are the same. None
        streams images that would take more than an eighth of the memory, because other processes may hold them too.
      workers: Number of processes that decode streamed images; None starts one for each processor.
      prepare: Whether a data set that is not prepared in data_dir is prepared there. If not, nothing is written.

    Returns:
      The data set. Its images are uint8 [N, H, W, C], an array or an `ImageStream`; its labels are int32 [N], or
      float32 [N, K] for multi-label data. Training images of an image_folder may have no labels.

    Raises:
      UserError: If the data cannot be obtained, is damaged or does not fit; the message names what is wrong and what is
        allowed. It is a NotPreparedError if the data set would have to be prepared.
    """
    data_dir = None if data_dir is None else str(local_folder(data_dir))
    # Images of other data sets are read in the same way as in their papers and in other programs.
    options: dict[str, Any] = {"exif_orientation": exif_orientation} if name == "image_folder" else {}
    options |= {} if name in ("image_folder", "digit_pairs") else {"prepare": prepare}
    load: Any = DATASETS.get(name) or functools.partial(tfds_source.load_named, name, table=tuple(DATASETS))
    dataset = load(data_dir=data_dir, path=path, train_examples=train_examples, image_size=image_size, **options)
    if validation_examples is not None:
        dataset = hold_out(dataset, validation_examples, validation_seed)
    _check_categories(dataset)
    return _decode(dataset, streaming, workers or len(os.sched_getaffinity(0)))


def _decode(dataset: ImageDataset, streaming: bool | None, workers: int) -> ImageDataset:
    """Returns the data set with arrays or streams in place of readers."""
    splits = {name: split for name in ("train", "test", "validation") if (split := getattr(dataset, name)) is not None}
    readers: list[Any] = [split.images for split in splits.values()]
    if any(isinstance(reader, np.ndarray) for reader in readers):
        if streaming:
            raise UserError(f"data set '{dataset.name}' cannot be streamed: only image files and array_record can")
        return dataset
    size = sum(math.prod(reader.shape) for reader in readers)
    if streaming or (streaming is None and size > total_memory() / 8):
        pool = Workers(workers)
        images = [ImageStream(reader, pool) for reader in readers]
    else:
        images = [reader.read() for reader in readers]
    decoded = zip(splits.items(), images, strict=True)
    return dataclasses.replace(dataset, **{name: Split(found, split.labels) for (name, split), found in decoded})


def _check_categories(dataset: ImageDataset) -> None:
    if dataset.num_classes < 2:
        raise UserError(f"data set '{dataset.name}' has {dataset.num_classes} class: classification needs at least two")
    splits = {"test": dataset.test} if dataset.unlabeled else {"train": dataset.train, "test": dataset.test}
    for split_name, split in splits.items():
        found = np.flatnonzero(split.labels.any(axis=0)) if dataset.multilabel else split.labels
        missing = np.setdiff1d(np.arange(dataset.num_classes), found)
        if len(missing):
            names = ", ".join(dataset.categories[label] for label in missing[:5])
            raise UserError(f"data set '{dataset.name}' has no images of {names} in its {split_name} split")
