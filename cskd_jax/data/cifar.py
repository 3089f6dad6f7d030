"""CIFAR-10 and CIFAR-100 from their original binary archives, without TensorFlow."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cskd_jax.data.archives import (
    TAR_SUFFIXES,
    Archive,
    check_categories,
    check_names,
    locate,
    read_tar,
    require_members,
    text_lines,
)
from cskd_jax.data.tfds_source import ArraySource, Content, SourceSplit
from cskd_jax.errors import UserError

_IMAGE_SHAPE = (32, 32, 3)
_IMAGE_BYTES = 32 * 32 * 3
_MAX_MEMBER = 50_000 * (2 + _IMAGE_BYTES)


@dataclasses.dataclass(frozen=True)
class CifarArchive(Archive):
    """An archive of CIFAR, whose records are one byte per label and the red, green and blue planes of the image.

    Attributes:
      splits: Binary members of each split.
      label_files: Members with the label names of each label feature, in the order of the label bytes of a record.
      label_sizes: Numbers of classes of the label features.
    """

    splits: Mapping[str, Sequence[str]]
    label_files: Mapping[str, str]
    label_sizes: Mapping[str, int]


ARCHIVE_10 = CifarArchive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    size=170052171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    stem="cifar-10-binary",
    suffixes=TAR_SUFFIXES,
    splits={
        "train": [f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)],
        "test": ["cifar-10-batches-bin/test_batch.bin"],
    },
    label_files={"label": "cifar-10-batches-bin/batches.meta.txt"},
    label_sizes={"label": 10},
)

ARCHIVE_100 = CifarArchive(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    size=168513733,
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    stem="cifar-100-binary",
    suffixes=TAR_SUFFIXES,
    splits={"train": ["cifar-100-binary/train.bin"], "test": ["cifar-100-binary/test.bin"]},
    label_files={
        "coarse_label": "cifar-100-binary/coarse_label_names.txt",
        "label": "cifar-100-binary/fine_label_names.txt",
    },
    label_sizes={"label": 100, "coarse_label": 20},
)


def read(archive: CifarArchive, data_root: Path) -> Content:
    """Finds or downloads the archive and reads it.

    Args:
      archive: Archive to read.
      data_root: Data folder.

    Returns:
      The content in the order of the archive, with images uint8 [N, 32, 32, 3].

    Raises:
      UserError: If the archive is invalid, or if there is none and the download failed.
    """
    path, official = locate(archive, data_root)
    return read_archive(archive, path)._replace(official=official)


def read_archive(archive: CifarArchive, path: Path) -> Content:
    """Reads an archive and checks all of it: members, complete records, labels, label names, no empty split.

    Args:
      archive: Archive that the file should be.
      path: Path of a tar archive, compressed or not.

    Returns:
      The content in the order of the archive, with images uint8 [N, 32, 32, 3].

    Raises:
      UserError: If something is missing or damaged; the message names the archive and the member.
    """
    wanted = [*archive.label_files.values(), *(file for files in archive.splits.values() for file in files)]
    members = dict(read_tar(archive, path, wanted.__contains__, _MAX_MEMBER))
    require_members(archive, path, wanted, members)
    names = {key: text_lines(members[file]) for key, file in archive.label_files.items()}
    for key, file in archive.label_files.items():
        check_names(path, file, names[key], archive.label_sizes[key])
    splits = {}
    for split, files in archive.splits.items():
        records = np.concatenate([_records(archive, path, file, members[file]) for file in files])
        if not len(records):
            raise UserError(f"{path}: the {split} split is empty: {', '.join(files)} should hold records")
        first_pixel = len(archive.label_files)
        images = records[:, first_pixel:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        splits[split] = SourceSplit(images, {key: records[:, column] for column, key in enumerate(archive.label_files)})
        check_categories(path, split, names["label"], splits[split].labels["label"])
    return Content(splits, names)


def _records(archive: CifarArchive, path: Path, member: str, data: bytes | bytearray) -> np.ndarray:
    """Returns the records of a member, uint8 [N, labels + 3072], with every label in range."""
    size = len(archive.label_files) + _IMAGE_BYTES
    if len(data) % size:
        raise UserError(f"{path}: member {member} has {len(data)} bytes, not a whole number of records of {size} bytes")
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    for column, key in enumerate(archive.label_files):
        wrong = np.flatnonzero(records[:, column] >= archive.label_sizes[key])
        if wrong.size:
            raise UserError(
                f"{path}: member {member}, record {wrong[0]} has {key} {records[wrong[0], column]}; "
                f"it must be from 0 to {archive.label_sizes[key] - 1}"
            )
    return records


def _source(name: str, archive: CifarArchive, description: str) -> ArraySource:
    return ArraySource(
        name=name,
        version="3.0.2",  # The version of the stock builder, which uses the same features and folder.
        description=description,
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        image_shape=_IMAGE_SHAPE,
        label_sizes=archive.label_sizes,
        read=functools.partial(read, archive),
    )


CIFAR10 = _source("cifar10", ARCHIVE_10, "Color images of 32x32 pixels in 10 classes.")
CIFAR100 = _source("cifar100", ARCHIVE_100, "Color images of 32x32 pixels in 100 classes, which form 20 groups.")
