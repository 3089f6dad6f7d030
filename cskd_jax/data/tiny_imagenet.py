"""Tiny ImageNet from its original archive, without TensorFlow.

The classes are the WordNet ids of wnids.txt, in its order. Their English names in words.txt are not used, because
several of them are long lists of synonyms. The images of val, whose labels are known, are used for evaluation; those of
test, whose labels are unknown, are left out.
"""

import dataclasses
import functools
import posixpath
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cskd_jax.data.archives import (
    Archive,
    check_categories,
    check_names,
    decode,
    locate,
    open_zip,
    read_zipped,
    require_members,
    text_lines,
)
from cskd_jax.data.tfds_source import ArraySource, Content, SourceSplit
from cskd_jax.errors import UserError

NUM_CLASSES = 200
_SIDE = 64
_ROOT = "tiny-imagenet-200/"
_NAMES = _ROOT + "wnids.txt"
_ANNOTATIONS = _ROOT + "val/val_annotations.txt"
_EXTENSION = ".JPEG"
_MAX_IMAGE = 1 << 20  # bytes of an image file; the largest has 9,000

ARCHIVE = Archive(
    url="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    size=248100043,
    sha256="6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
    stem="tiny-imagenet-200",
    suffixes=(".zip",),
)


@dataclasses.dataclass(frozen=True)
class ZippedImages:
    """Images in a zip archive, decoded one by one so that they are not all in memory at once.

    Attributes:
      archive: Archive that the file should be, for messages.
      path: Path of the file.
      members: Members with the images, in the order of iteration.
    """

    archive: Archive
    path: Path
    members: Sequence[zipfile.ZipInfo]

    def __iter__(self) -> Iterator[np.ndarray | bytes]:
        """Yields the file if it is in RGB, and otherwise its pixels converted to RGB, uint8 [64, 64, 3].

        Raises:
          UserError: If an image is damaged or has a different size; the message names the archive and the member.
        """
        with open_zip(self.archive, self.path) as file:
            for member in self.members:
                data = read_zipped(self.archive, self.path, file, member, _MAX_IMAGE)
                image = decode(self.path, member.filename, data, (_SIDE, _SIDE))
                # Some are grayscale.
                yield data if image.mode == "RGB" else np.asarray(image.convert("RGB"))


def read(archive: Archive, data_root: Path) -> Content:
    """Finds or downloads the archive, and reads it.

    Args:
      archive: Archive to read: `ARCHIVE`, or one with a different address and checksum.
      data_root: Data folder.

    Returns:
      The content: train by class and then by file name, validation in the order of its annotations.

    Raises:
      UserError: If the archive is invalid, or if there is none and the download failed.
    """
    path, official = locate(archive, data_root)
    return read_archive(archive, path)._replace(official=official)


def read_archive(archive: Archive, path: Path) -> Content:
    """Reads an archive and checks all of it except the images, which are checked when they are decoded.

    Args:
      archive: Archive that the file should be, for messages.
      path: Path of a zip archive.

    Returns:
      The content: train by class and then by file name, validation in the order of its annotations.

    Raises:
      UserError: If something is missing or damaged; the message names the archive and the member.
    """
    with open_zip(archive, path) as file:
        # In repacked archives, names may begin with "./".
        files = [member for member in file.infolist() if not member.filename.endswith("/")]
        members = {posixpath.normpath(member.filename): member for member in files}
        require_members(archive, path, (_NAMES, _ANNOTATIONS), members)
        names, annotations = (
            text_lines(read_zipped(archive, path, file, members[name])) for name in (_NAMES, _ANNOTATIONS)
        )
    check_names(path, _NAMES, names, NUM_CLASSES)
    labels = {name: label for label, name in enumerate(names)}
    splits = {}
    for split, labeled in (
        ("train", _train_labels(path, members, labels)),
        ("validation", _validation_labels(archive, path, members, labels, annotations)),
    ):
        label_values = np.fromiter(labeled.values(), np.int32)
        check_categories(path, split, names, label_values)
        images = ZippedImages(archive, path, [members[name] for name in labeled])
        splits[split] = SourceSplit(images, {"label": label_values})
    return Content(splits, {"label": names})


def _train_labels(path: Path, members: Mapping[str, zipfile.ZipInfo], labels: Mapping[str, int]) -> dict[str, int]:
    """Returns {member: label} of train/WNID/images/*.JPEG, by class and then by name."""
    found = {}
    for member in members:
        folder, file = posixpath.split(member)
        category = posixpath.basename(posixpath.dirname(folder))
        if folder == f"{_ROOT}train/{category}/images" and _is_image(file):
            if category not in labels:
                raise UserError(f"{path}: member {member} belongs to class {category}, which {_NAMES} does not list")
            found[member] = labels[category]
    return dict(sorted(found.items(), key=lambda item: (item[1], item[0])))


def _validation_labels(
    archive: Archive,
    path: Path,
    members: Mapping[str, zipfile.ZipInfo],
    labels: Mapping[str, int],
    annotations: Sequence[str],
) -> dict[str, int]:
    """Returns {member: label} of val/images/*.JPEG, in the order of the annotations: file, class, bounding box."""
    found = {}
    for line in annotations:
        file, category, *_ = (*line.split(), "")
        member = f"{_ROOT}val/images/{file}"
        if category not in labels:
            raise UserError(
                f"{path}: member {_ANNOTATIONS} says '{category}' for {file}; {_NAMES} does not list that class"
            )
        if member in found:
            raise UserError(f"{path}: member {_ANNOTATIONS} lists {file} twice")
        found[member] = labels[category]
    require_members(archive, path, found, members)
    for member in members:
        folder, file = posixpath.split(member)
        if folder == f"{_ROOT}val/images" and _is_image(file) and member not in found:
            raise UserError(f"{path}: member {_ANNOTATIONS} has no annotation for {file}")
    return found


def _is_image(file: str) -> bool:
    return file.endswith(_EXTENSION) and not file.startswith(".")


SOURCE = ArraySource(
    name="tiny_imagenet",
    version="1.0.0",
    description="Color images of 64x64 pixels in 200 classes of ImageNet.",
    homepage="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    image_shape=(_SIDE, _SIDE, 3),
    label_sizes={"label": NUM_CLASSES},
    read=functools.partial(read, ARCHIVE),
)
