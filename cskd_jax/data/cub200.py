"""CUB-200-2011, photographs of birds, from its original archive, without TensorFlow.

The photographs have various sizes. They are stored as squares of 224 pixels: the shorter side is resized to 256 pixels,
and the middle is cut out, which is the usual preprocessing for evaluation on such photographs.
"""

import functools
import posixpath
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import numpy as np

from cskd_jax.data.archives import (
    TAR_SUFFIXES,
    Archive,
    check_categories,
    check_names,
    decode,
    locate,
    read_tar,
    require_members,
    text_lines,
)
from cskd_jax.data.images import middle_square
from cskd_jax.data.tfds_source import ArraySource, Content, SourceSplit
from cskd_jax.errors import UserError

NUM_CLASSES = 200
_SIDE = 224
_ROOT = "CUB_200_2011/"
_CLASSES = _ROOT + "classes.txt"
_IMAGES = _ROOT + "images.txt"
_LABELS = _ROOT + "image_class_labels.txt"
_SPLIT = _ROOT + "train_test_split.txt"
_TABLES = (_CLASSES, _IMAGES, _LABELS, _SPLIT)
_IMAGE_FOLDER = _ROOT + "images/"
_MAX_MEMBER = 16 << 20  # bytes, of a photograph or a table
# The longer sides of the 11,788 photographs have 500 pixels.
_MAX_IMAGES, _MAX_PIXELS = 12_000, 1_000_000

ARCHIVE = Archive(
    url="https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
    size=1150585339,
    sha256="0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
    stem="CUB_200_2011",
    suffixes=(".tgz", *TAR_SUFFIXES),
)


def read(archive: Archive, data_root: Path) -> Content:
    """Finds or downloads the archive, and reads it.

    Args:
      archive: Archive to read: `ARCHIVE`, or one with a different address and checksum.
      data_root: Data folder.

    Returns:
      The content in the order of images.txt, with images uint8 [224, 224, 3].

    Raises:
      UserError: If the archive is invalid, or if there is none and the download failed.
    """
    path, official = locate(archive, data_root)
    return read_archive(archive, path)._replace(official=official)


def read_archive(archive: Archive, path: Path) -> Content:
    """Reads an archive and checks all of it: the tables, and that every image is present and valid.

    Args:
      archive: Archive that the file should be, for messages.
      path: Path of a tar archive, compressed or not.

    Returns:
      The content in the order of images.txt, with images uint8 [224, 224, 3].

    Raises:
      UserError: If something is missing or damaged; the message names the archive and the member.
    """
    texts, pixels = {}, {}
    # One pass, because the archive cannot be read from the middle; images are resized right away to save memory.
    for member, data in read_tar(archive, path, _is_wanted, _MAX_MEMBER):
        if member in _TABLES:
            texts[member] = text_lines(data)
        elif member.endswith(".jpg") and not posixpath.basename(member).startswith("."):
            # Some are grayscale. They are converted first, because Pillow does not resize images of all modes
            # bilinearly.
            if len(pixels) == _MAX_IMAGES:
                raise UserError(f"{path} has more than {_MAX_IMAGES:,} images: replace it with {archive.url}")
            image = decode(path, member, data, most_pixels=_MAX_PIXELS)
            pixels[member] = np.asarray(middle_square(image.convert("RGB"), _SIDE))
    require_members(archive, path, _TABLES, texts)
    classes, files, class_of, is_training = (_table(path, member, texts[member]) for member in _TABLES)
    names = list(classes.values())
    check_names(path, _CLASSES, names, NUM_CLASSES)
    label_of = {identifier: label for label, identifier in enumerate(classes)}
    _check_values(path, _LABELS, files, class_of, label_of)
    _check_values(path, _SPLIT, files, is_training, ("0", "1"))
    require_members(archive, path, (_IMAGE_FOLDER + file for file in files.values()), pixels)
    splits = {}
    for split, flag in (("train", "1"), ("test", "0")):
        chosen = [image for image in files if is_training[image] == flag]
        labels = np.array([label_of[class_of[image]] for image in chosen], np.int32)
        check_categories(path, split, names, labels)
        splits[split] = SourceSplit([pixels[_IMAGE_FOLDER + files[image]] for image in chosen], {"label": labels})
    return Content(splits, {"label": names})


def _is_wanted(name: str) -> bool:
    return name in _TABLES or name.startswith(_IMAGE_FOLDER)


def _table(path: Path, member: str, lines: Sequence[str]) -> dict[str, str]:
    """Returns {identifier: value} from lines "IDENTIFIER VALUE"."""
    table = {}
    for number, line in enumerate(lines, 1):
        identifier, _, value = line.partition(" ")
        if not value or identifier in table:
            raise UserError(
                f"{path}: member {member}, line {number} is '{line}'; it must be a new number and a value, "
                "separated by a space"
            )
        table[identifier] = value
    return table


def _check_values(
    path: Path, member: str, files: Mapping[str, str], table: Mapping[str, str], allowed: Container[str]
) -> None:
    """Raises UserError unless the table gives every image one of the allowed values."""
    for image, file in files.items():
        if table.get(image, "") not in allowed:
            found = f"says '{table[image]}' for" if image in table else "has no entry for"
            raise UserError(f"{path}: member {member} {found} image {image}, {file}")


SOURCE = ArraySource(
    name="cub200",
    version="1.0.0",
    description="Photographs of birds in 200 classes, as squares of 224x224 pixels.",
    homepage="https://www.vision.caltech.edu/datasets/cub_200_2011/",
    image_shape=(_SIDE, _SIDE, 3),
    label_sizes={"label": NUM_CLASSES},
    read=functools.partial(read, ARCHIVE),
)
