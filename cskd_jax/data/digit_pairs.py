"""Two digits in one image: a small multi-label data set, made of the digits that are part of scikit-learn."""

from pathlib import Path

import numpy as np

from cskd_jax.data import digits, tfds_source
from cskd_jax.data.types import ImageDataset, Split, balanced_indices
from cskd_jax.errors import UserError

CATEGORIES = tuple("0123456789")
SIZE = 16  # Height and width of an image; a digit has 8 of each.
ROUNDS = {"train": 1, "test": 4}


def load(*, data_dir: str | None, path: str | None, train_examples: int | None, image_size: int | None) -> ImageDataset:
    """Makes the images: two digits side by side, each at a random height.

    An image of the classes a and b is labeled 1 at a and b and 0 elsewhere; an image that shows a digit twice has a
    single 1. In each round over a split, every digit of that split of `digits` appears once on the left and once on the
    right: 1440 training images from its 1440 training digits and, in four rounds, 1428 test images from its 357 test
    digits. Pairs and heights are drawn with fixed seeds, so the images are always the same.

    Args:
      data_dir: Not used: the digits are part of scikit-learn, and making the images takes less time than reading them.
      path: Must be None, because it is an argument of image_folder.
      train_examples: Size of the subset that `balanced_indices` chooses; None keeps all examples.
      image_size: Must be None, because the images have a fixed size.

    Returns:
      The data set, with images uint8 [N, 16, 16, 1] and labels float32 [N, 10].
    """
    del data_dir
    tfds_source.refuse_path("digit_pairs", path)
    if image_size is not None:
        raise UserError(
            f"image_size={image_size} applies only to data sets that are read from files, not to digit_pairs"
        )
    sources = digits.read(Path()).splits
    splits = {}
    for seed, (name, rounds) in enumerate(ROUNDS.items()):
        generator = np.random.default_rng(seed)
        images, labels = np.asarray(sources[name].images), sources[name].labels["label"]
        made = [_pair(images, labels, generator) for _ in range(rounds)]
        splits[name] = Split(*(np.concatenate(parts) for parts in zip(*made, strict=True)))
    chosen = balanced_indices(splits["train"].labels, CATEGORIES, train_examples)
    train = Split(*(array[chosen] for array in splits["train"]))
    return ImageDataset("digit_pairs", train, splits["test"], CATEGORIES)


def _pair(images: np.ndarray, categories: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns N images of two digits each, made from N digits, and their labels."""
    count, height, width, channels = images.shape
    pairs = np.zeros((count, SIZE, SIZE, channels), np.uint8)
    labels = np.zeros((count, len(CATEGORIES)), np.float32)
    for left in range(0, SIZE, width):
        order, tops = generator.permutation(count), generator.integers(0, SIZE - height + 1, count)
        rows = tops[:, None] + np.arange(height)
        pairs[np.arange(count)[:, None], rows, left : left + width] = images[order]
        labels[np.arange(count), categories[order]] = 1
    return pairs, labels
