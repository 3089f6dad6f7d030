"""A folder of image files: PATH/train/CLASS/* or PATH/train/*, and PATH/test/CLASS/* (or PATH/val/CLASS/*)."""

import itertools
import logging
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cskd_jax.data.images import read_image
from cskd_jax.data.types import NO_LABEL, ImageDataset, Split, balanced_indices
from cskd_jax.errors import UserError, printable
from cskd_jax.files import entries_below, full_path, is_folder

_logger = logging.getLogger(__name__)

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp", ".gif", ".jfif", ".tif", ".tiff")
_CHANNELS = 3
# Counting files in deeper folders stops at this number: the whole disk may be below a link.
_MAX_COUNTED = 100_000


def load(
    *,
    data_dir: str | None,
    path: str | None,
    train_examples: int | None,
    image_size: int | None,
    exif_orientation: bool = True,
) -> ImageDataset:
    """Finds the images of a folder.

    The classes are the sorted names of the folders in train. The images of a class are its files, ordered by name. If
    train holds images and no folders, its images have no labels, and the classes are those of test. Files with other
    extensions, hidden files and folders, broken links, files in deeper folders or outside of a class folder, and
    everything beside train and test are left out with a warning. Images are always converted to three channels, RGB:
    grayscale is repeated, and transparency is dropped. Only the first image of an animation is read.

    Args:
      data_dir: Not used.
      path: Folder of the images.
      train_examples: Size of the subset that `balanced_indices` chooses; None keeps all examples.
      image_size: Side of the squares that `images.read_image` makes of the images; with None, all images must have the
        size of the first.
      exif_orientation: Whether images are rotated according to their EXIF data, as photographs taken with phones
        require.

    Returns:
      The data set, with readers of images uint8 [N, H, W, 3].

    Raises:
      UserError: If something is missing, is damaged or does not fit; the message names the folder or the file.
    """
    del data_dir
    if path is None:
        raise UserError("data set image_folder needs path: a folder with train/CLASS/* and test/CLASS/*")
    root = full_path(path)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: the path of image_folder must hold train and test (or val)")
    if not (root / "train").is_dir():
        raise UserError(
            f"{root} has no folder train: image_folder reads train/CLASS/*, or train/* for images without labels"
        )
    test_folder = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if test_folder is None:
        raise UserError(f"{root} has no folder test or val: image_folder reads one of them")

    left_out = LeftOut()
    with os.scandir(root) as entries:
        others = [entry.path for entry in entries if entry.name not in ("train", test_folder.name)]
    left_out.add(f"other files or folders beside train and {test_folder.name}", others)
    unlabeled = _list_unlabeled(root / "train", left_out)
    train_files = {} if unlabeled else _list_split(root / "train", left_out)
    test_files = _list_split(test_folder, left_out)
    categories = tuple(train_files or test_files)
    if train_files:
        _check_categories(categories, test_files, test_folder)
    if left_out:
        _logger.warning("%s: skipped files: %s", printable(str(root)), left_out)

    files, labels = _flatten(train_files, categories) if train_files else _without_labels(unlabeled)
    chosen = balanced_indices(labels, categories, train_examples)
    files = files[chosen]
    image_shape = read_image(files[0], files[0], _CHANNELS, image_size, upright=exif_orientation).shape
    settings = image_shape, image_size, exif_orientation
    train = Split(FileImages(files, *settings), labels[chosen])
    files, labels = _flatten(test_files, categories)
    return ImageDataset("image_folder", train, Split(FileImages(files, *settings), labels), categories)


class LeftOut:
    """The files that are not read, counted by reason, with an example of each."""

    def __init__(self):
        self._counts: dict[str, int] = {}
        self._examples: dict[str, str] = {}

    def add(self, reason: str, paths: Iterable[str]) -> None:
        """Counts files that are left out for the given reason."""
        for path in paths:
            self._counts[reason] = self._counts.get(reason, 0) + 1
            self._examples.setdefault(reason, path)

    def add_all(self, other: "LeftOut") -> None:
        """Adds the counts of another object."""
        for reason, count in other._counts.items():
            self._counts[reason] = self._counts.get(reason, 0) + count
            self._examples.setdefault(reason, other._examples[reason])

    def __bool__(self):
        return bool(self._counts)

    def __str__(self):
        return "; ".join(
            f"{count:,} {reason} (such as {printable(self._examples[reason])})"
            for reason, count in self._counts.items()
        )


def _list_unlabeled(folder: Path, left_out: LeftOut) -> list[str]:
    """Returns the image files of a folder that holds no folders; an empty result if it holds any."""
    with os.scandir(folder) as entries:
        if any(is_folder(entry) and not entry.name.startswith(".") for entry in entries):
            return []
    own = LeftOut()
    found = sorted(_images(folder, own))
    if found:
        left_out.add_all(own)
    return found


def _without_labels(files: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns files as str objects [N], and for each the label that stands for "no label"."""
    return np.array(files, object), np.full(len(files), NO_LABEL, np.int32)


def _list_split(folder: Path, left_out: LeftOut) -> dict[str, list[str]]:
    """Returns the image files of each class; classes and files are sorted by name."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    folders = [entry for entry in entries if is_folder(entry)]
    names = [entry.name for entry in folders if not entry.name.startswith(".")]
    if not names:
        raise UserError(f"{folder} has no class folders: image_folder reads {folder.name}/CLASS/*")
    _check_names(folder, names)
    left_out.add("hidden folders", (entry.path for entry in folders if entry.name.startswith(".")))
    left_out.add("outside of a class folder", (entry.path for entry in entries if not is_folder(entry)))
    files = {}
    for name in names:
        own = LeftOut()
        files[name] = sorted(_images(folder / name, own))
        left_out.add_all(own)
        if not files[name]:
            raise UserError(
                f"{folder / name} has no images: file names must end in one of {', '.join(EXTENSIONS)}"
                + (f"; skipped files: {own}" if own else "")
            )
    return files


def _images(folder: Path, left_out: LeftOut) -> list[str]:
    """Returns the image files of a folder, and counts everything else in it."""
    with os.scandir(folder) as scanned:
        entries = list(scanned)
    found = []
    for entry in entries:
        if entry.name.startswith("."):
            left_out.add("hidden", [entry.path])
        elif is_folder(entry):
            left_out.add("in folders nested too deeply: move the images up", _files_below(entry.path))
        elif not os.path.exists(entry.path):
            left_out.add("broken links", [entry.path])
        elif not entry.is_file():
            left_out.add("pipes, devices or similar", [entry.path])
        elif not entry.name.lower().endswith(EXTENSIONS):
            left_out.add(f"in formats other than {', '.join(EXTENSIONS)}", [entry.path])
        else:
            found.append(entry.path)
    return found


def _files_below(folder: str) -> Iterator[str]:
    files = (entry.path for entry in entries_below(folder, skip_unreadable=True) if not is_folder(entry))
    return itertools.islice(files, _MAX_COUNTED)


def _check_names(folder: Path, names: Sequence[str]) -> None:
    """Raises UserError for a name that the results files cannot hold; warns about names that look the same."""
    by_look: dict[str, str] = {}
    for name in names:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{folder / name}: the name of the folder is not valid UTF-8: rename it") from None
        other = by_look.setdefault(_look(name), name)
        if other != name:
            _logger.warning(
                "%s: the classes %s and %s are distinct, but their names differ only in case or Unicode form",
                printable(str(folder)),
                ascii(other),
                ascii(name),
            )


def _look(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _check_categories(categories: Sequence[str], test_files: Mapping[str, list[str]], test_folder: Path) -> None:
    """Raises UserError unless the test split has the classes of the training split."""
    for name in categories:
        if name not in test_files:
            raise UserError(f"{test_folder} is missing the class '{name}', which train has{_like(name, test_files)}")
    for name in test_files:
        if name not in categories:
            raise UserError(f"{test_folder} has the class '{name}', which train does not have{_like(name, categories)}")


def _like(name: str, others: Iterable[str]) -> str:
    """Returns an addition to a message if another name looks the same as `name`."""
    same = next((other for other in others if _look(other) == _look(name)), None)
    if same is None:
        return ""
    return f"; it has {same!a}, which differs from {name!a} only in case or Unicode form: rename one"


def _flatten(files: Mapping[str, list[str]], categories: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns all files, class by class, as str objects [N], and their labels, int32 [N]."""
    counts = [len(files[name]) for name in categories]
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return np.array([file for name in categories for file in files[name]], object), labels


class FileImages:
    """A `Reader` for image files.

    Args:
      files: Paths of the files, str objects [N].
      image_shape: (H, W, C) that every image must have.
      image_size: Side of the squares that `read_image` makes of the images, or None.
      upright: Whether images are rotated according to their EXIF data.
    """

    def __init__(self, files: np.ndarray, image_shape: tuple[int, ...], image_size: int | None, upright: bool = False):
        self.shape = (len(files), *image_shape)
        self._files, self._image_size, self._upright = files, image_size, upright

    def select(self, index: np.ndarray) -> "FileImages":
        """Returns a reader of the images at positions `index`, int [n]."""
        return FileImages(self._files[index], self.shape[1:], self._image_size, self._upright)

    def read(self) -> np.ndarray:
        """Returns all images, uint8 [N, H, W, C]; raises UserError if one is damaged or has a different size."""
        images, expected = np.empty(self.shape, np.uint8), self.shape[1:]
        for row, file in enumerate(self._files):
            images[row] = read_image(file, file, _CHANNELS, self._image_size, expected=expected, upright=self._upright)
        return images
