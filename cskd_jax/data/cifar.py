"""CIFAR-10 and CIFAR-100 from their original binary archives, without TensorFlow.

The archive is looked for in the data folder and in its subfolder downloads, and downloaded where it is in neither. Its
members are read in memory; nothing is extracted to a path that an archive names.
"""

import dataclasses
import functools
import hashlib
import http.client
import lzma
import os
import posixpath
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from cskd_jax.data.tfds_source import ArraySource, Content, SourceSplit
from cskd_jax.errors import UserError

_IMAGE_SHAPE = (32, 32, 3)
_IMAGE_BYTES = 32 * 32 * 3
_SUFFIXES = (".tar.gz", ".tar", ".tar.xz")
_TIMEOUT_SECONDS = 30
_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Archive:
    """An original archive. A record is one byte per label, then the red, the green and the blue plane of the image.

    Attributes:
      url: Where the official archive is.
      size: Its size in bytes.
      sha256: Its checksum.
      stem: Its file name without the suffix.
      splits: The binary members by split.
      label_files: The members with the label names by label feature, in the order of the label bytes of a record.
      label_sizes: The number of categories by label feature.
    """

    url: str
    size: int
    sha256: str
    stem: str
    splits: Mapping[str, Sequence[str]]
    label_files: Mapping[str, str]
    label_sizes: Mapping[str, int]


ARCHIVE_10 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    size=170052171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    stem="cifar-10-binary",
    splits={
        "train": [f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)],
        "test": ["cifar-10-batches-bin/test_batch.bin"],
    },
    label_files={"label": "cifar-10-batches-bin/batches.meta.txt"},
    label_sizes={"label": 10},
)

ARCHIVE_100 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    size=168513733,
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    stem="cifar-100-binary",
    splits={"train": ["cifar-100-binary/train.bin"], "test": ["cifar-100-binary/test.bin"]},
    label_files={
        "coarse_label": "cifar-100-binary/coarse_label_names.txt",
        "label": "cifar-100-binary/fine_label_names.txt",
    },
    label_sizes={"label": 100, "coarse_label": 20},
)


def read(archive: Archive, data_root: Path) -> Content:
    """Finds or downloads the archive, and reads it.

    Args:
      archive: Which one.
      data_root: The data folder.

    Returns:
      The content in the order of the archive, with images uint8 [N, 32, 32, 3].

    Raises:
      UserError: The archive is unsound, or there is none and the download failed.
    """
    path = find_archive(archive, data_root)
    if path is None:
        path = download(archive, data_root / "downloads")
    elif _sha256(path) != archive.sha256:
        logging.warning("%s is not the official %s: its contents are checked and used.", path, archive.url)
    return read_archive(archive, path)


def find_archive(archive: Archive, data_root: Path) -> Path | None:
    """Returns the archive that lies in the data folder or in its subfolder downloads; None if there is none."""
    for folder in (data_root, data_root / "downloads"):
        for suffix in _SUFFIXES:
            path = folder / (archive.stem + suffix)
            if path.is_file():
                return path
    return None


def download(archive: Archive, folder: Path) -> Path:
    """Downloads the official archive.

    Args:
      archive: Which one.
      folder: Where to put it; it is created.

    Returns:
      The path of the complete, verified file.

    Raises:
      UserError: The download failed, or what arrived is not the official archive.
    """
    target = folder / (archive.stem + ".tar.gz")
    by_hand = f"download it by other means and put it at {target}"
    # A name of its own per process: several may download at once, and the last rename wins with the same bytes.
    part = folder / f"{target.name}.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            digest = _stream(archive, part)
            if digest != archive.sha256:
                raise UserError(f"{archive.url} gave a file with checksum {digest}, not {archive.sha256}: {by_hand}")
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {archive.url} ({error}): {by_hand}") from error
    return target


def _stream(archive: Archive, part: Path) -> str:
    """Writes what the URL gives to `part` and returns its SHA-256."""
    digest = hashlib.sha256()
    logging.info("Downloading %s", archive.url)
    with (
        urllib.request.urlopen(archive.url, timeout=_TIMEOUT_SECONDS) as response,
        part.open("wb") as file,
        tqdm(total=archive.size, unit="B", unit_scale=True, desc=archive.stem, disable=not sys.stderr.isatty()) as bar,
    ):
        while chunk := response.read(_CHUNK_BYTES):
            file.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_archive(archive: Archive, path: Path) -> Content:
    """Reads an archive and checks all of it: members, whole records, labels, label names, no empty split.

    Args:
      archive: Which one it should be.
      path: The file: a tar archive, compressed or not.

    Returns:
      The content in the order of the archive, with images uint8 [N, 32, 32, 3].

    Raises:
      UserError: Something is missing or damaged; the message names the archive and the member.
    """
    members = _read_members(archive, path)
    names = {
        key: _label_names(path, file, members[file], archive.label_sizes[key])
        for key, file in archive.label_files.items()
    }
    splits = {}
    for split, files in archive.splits.items():
        records = np.concatenate([_records(archive, path, file, members[file]) for file in files])
        if not len(records):
            raise UserError(f"{path}: the {split} split is empty: {', '.join(files)} should hold records")
        first_pixel = len(archive.label_files)
        images = records[:, first_pixel:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        splits[split] = SourceSplit(images, {key: records[:, column] for column, key in enumerate(archive.label_files)})
    return Content(splits, names)


def _read_members(archive: Archive, path: Path) -> dict[str, bytes]:
    """Returns the bytes of every member that is needed."""
    wanted = [*archive.label_files.values(), *(file for files in archive.splits.values() for file in files)]
    members = {}
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)  # Repacked archives often say "./".
                if name in wanted and member.isfile():
                    members[name] = tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged or no tar archive ({reason}): replace it by {archive.url}") from error
    missing = [name for name in wanted if name not in members]
    if missing:
        raise UserError(f"{path} lacks the member {', '.join(missing)}: replace it by {archive.url}")
    return members


def _label_names(path: Path, member: str, data: bytes, expected: int) -> list[str]:
    """Returns the names, one a line, of `expected` categories."""
    names = [line.strip() for line in data.decode("utf-8", errors="replace").splitlines() if line.strip()]
    if len(names) != expected or len(set(names)) != expected:
        raise UserError(
            f"{path}: member {member} should hold {expected} different label names, one a line: "
            f"it has {len(names)} lines, {len(set(names))} of them different"
        )
    return names


def _records(archive: Archive, path: Path, member: str, data: bytes) -> np.ndarray:
    """Returns the records of a member, uint8 [N, labels + 3072], with every label in range."""
    size = len(archive.label_files) + _IMAGE_BYTES
    if len(data) % size:
        raise UserError(f"{path}: member {member} has {len(data)} bytes, which is no whole number of records of {size}")
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    for column, key in enumerate(archive.label_files):
        wrong = np.flatnonzero(records[:, column] >= archive.label_sizes[key])
        if wrong.size:
            raise UserError(
                f"{path}: member {member}, record {wrong[0]} has {key} {records[wrong[0], column]}: "
                f"allowed are 0 to {archive.label_sizes[key] - 1}"
            )
    return records


def _source(name: str, archive: Archive, description: str) -> ArraySource:
    return ArraySource(
        name=name,
        version="3.0.2",  # That of the stock builder, whose features and folder these are.
        description=description,
        homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
        image_shape=_IMAGE_SHAPE,
        label_sizes=archive.label_sizes,
        read=functools.partial(read, archive),
    )


CIFAR10 = _source("cifar10", ARCHIVE_10, "Colour images of 32x32 pixels in 10 categories.")
CIFAR100 = _source("cifar100", ARCHIVE_100, "Colour images of 32x32 pixels in 100 categories, which form 20 groups.")
