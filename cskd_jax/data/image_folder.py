"""A folder of image files: PATH/train/CLASS/* and PATH/test/CLASS/* (or PATH/val/CLASS/*)."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cskd_jax.data.images import check_size, read_image
from cskd_jax.data.types import ImageDataset, Split, balanced_indices
from cskd_jax.errors import UserError

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_CHANNELS = 3


def load(*, data_dir: str | None, path: str | None, train_examples: int | None, image_size: int | None) -> ImageDataset:
    """Finds the images of a folder.

    The classes are the sorted names of the folders in train. The images of a class are its files in the order of their
    names; other extensions, hidden files and deeper folders are ignored. Images are always converted to three channels,
    RGB: gray is repeated, transparency is dropped.

    Args:
      data_dir: Not used.
      path: Folder of the images.
      train_examples: Size of the subset that `balanced_indices` chooses; None keeps all examples.
      image_size: Side of the squares that `images.read_image` makes of the images; with None, all images must have the
        size of the first.

    Returns:
      The data set, with readers of images uint8 [N, H, W, 3].

    Raises:
      UserError: If something is missing, damaged or does not fit; the message names the folder or the file.
    """
    del data_dir
    if path is None:
        raise UserError("data set image_folder needs path: a folder with train/CLASS/* and test/CLASS/*")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: path of image_folder is one that holds train and test (or val)")
    if not (root / "train").is_dir():
        raise UserError(f"{root} has no folder train: image_folder reads train/CLASS/*")
    test_folder = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if test_folder is None:
        raise UserError(f"{root} has neither a folder test nor val: image_folder reads one of them")

    train_files = _list_split(root / "train")
    categories = tuple(train_files)
    test_files = _list_split(test_folder)
    _check_categories(categories, test_files, test_folder)

    files, labels = _flatten(train_files, categories)
    chosen = balanced_indices(labels, categories, train_examples)
    files = files[chosen]
    image_shape = read_image(files[0], files[0], _CHANNELS, image_size).shape
    train = Split(FileImages(files, image_shape, image_size), labels[chosen])
    files, labels = _flatten(test_files, categories)
    return ImageDataset("image_folder", train, Split(FileImages(files, image_shape, image_size), labels), categories)


def _list_split(folder: Path) -> dict[str, list[str]]:
    """Returns the image files of each class; classes and files are sorted by name."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{folder} has no class folders: image_folder reads {folder.name}/CLASS/*")
    files = {}
    for name in names:
        files[name] = sorted(
            entry.path
            for entry in os.scandir(folder / name)
            if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".") and entry.is_file()
        )
        if not files[name]:
            raise UserError(f"{folder / name} has no images: allowed are files with {', '.join(EXTENSIONS)}")
    return files


def _check_categories(categories: Sequence[str], test_files: Mapping[str, list[str]], test_folder: Path) -> None:
    """Raises UserError unless the test split has the classes of the training split."""
    for name in categories:
        if name not in test_files:
            raise UserError(f"{test_folder} lacks the class '{name}', which train has")
    for name in test_files:
        if name not in categories:
            raise UserError(f"{test_folder} has the class '{name}', which train lacks")


def _flatten(files: Mapping[str, list[str]], categories: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns all files, class by class, as str objects [N], and their labels, int32 [N]."""
    counts = [len(files[name]) for name in categories]
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return np.array([file for name in categories for file in files[name]], object), labels


class FileImages:
    """A `Reader` of image files.

    Args:
      files: Paths of the files, str objects [N].
      image_shape: (H, W, C) that every image must have.
      image_size: Side of the squares that `read_image` makes of the images, or None.
    """

    def __init__(self, files: np.ndarray, image_shape: tuple[int, int, int], image_size: int | None):
        self.shape = (len(files), *image_shape)
        self._files, self._image_size = files, image_size

    def select(self, index: np.ndarray) -> "FileImages":
        """Returns a reader of the images at positions `index`, int [n]."""
        return FileImages(self._files[index], self.shape[1:], self._image_size)

    def read(self) -> np.ndarray:
        """Returns all images, uint8 [N, H, W, C]; raises UserError if one is damaged or has another size."""
        images = np.empty(self.shape, np.uint8)
        for row, file in enumerate(self._files):
            image = read_image(file, file, _CHANNELS, self._image_size)
            check_size(file, image.shape, self.shape[1:])
            images[row] = image
        return images
