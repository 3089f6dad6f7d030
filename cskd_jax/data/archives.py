"""Original archives of data sets: finding, downloading and reading them without trusting their contents.

An archive is looked for in the data folder and in its subfolder downloads, and downloaded if it is in neither. Its
members are read in memory; nothing is extracted to a path that an archive names.
"""

import dataclasses
import hashlib
import http.client
import io
import logging
import lzma
import os
import posixpath
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from cskd_jax.data.images import open_image
from cskd_jax.errors import UserError

_logger = logging.getLogger(__name__)

TAR_SUFFIXES = (".tar.gz", ".tar", ".tar.xz")
_TIMEOUT_SECONDS = 30
_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Archive:
    """An original archive.

    Attributes:
      url: Address of the official archive.
      size: Size of the official archive in bytes.
      sha256: Checksum of the official archive.
      stem: File name of the archive without the suffix.
      suffixes: Suffixes that a file on disk may have; the first one is that of the official archive.
    """

    url: str
    size: int
    sha256: str
    stem: str
    suffixes: tuple[str, ...]


def locate(archive: Archive, data_root: Path) -> Path:
    """Finds the archive on disk or downloads it.

    A file whose checksum differs from the official one is accepted with a warning, because its contents are checked
    when it is read.

    Args:
      archive: Archive to find.
      data_root: Data folder.

    Returns:
      The path of the file.

    Raises:
      UserError: If there is no file and the download failed, or if the file cannot be read.
    """
    path = find_archive(archive, data_root)
    if path is None:
        return download(archive, data_root / "downloads")
    if sha256(path) != archive.sha256:
        _logger.warning("%s is not the official %s: its contents are checked and used.", path, archive.url)
    return path


def find_archive(archive: Archive, data_root: Path) -> Path | None:
    """Returns the archive that lies in the data folder or in its subfolder downloads; None if there is none."""
    for folder in (data_root, data_root / "downloads"):
        for suffix in archive.suffixes:
            path = folder / (archive.stem + suffix)
            if path.is_file():
                return path
    return None


def download(archive: Archive, folder: Path) -> Path:
    """Downloads the official archive.

    Args:
      archive: Archive to download.
      folder: Folder of the downloaded file; it is created.

    Returns:
      The path of the complete, verified file.

    Raises:
      UserError: If the download failed, or if the downloaded file is not the official archive.
    """
    target = folder / (archive.stem + archive.suffixes[0])
    by_hand = f"download it by other means and put it at {target}"
    # Each process has a file of its own: several may download at once, and the last rename wins with the same bytes.
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
    """Downloads the archive to `part` and returns the SHA-256 of the file."""
    digest = hashlib.sha256()
    _logger.info("downloading %s, %.0f MB", archive.url, archive.size / 1e6)
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


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits; raises UserError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_tar(archive: Archive, path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yields the normalized name and the bytes of every wanted file of a tar archive, in its order.

    Args:
      archive: Archive that the file should be, for messages.
      path: Path of a tar archive, compressed or not.
      wanted: Function that tells whether the member of a name is wanted.

    Yields:
      Pairs (name, bytes).

    Raises:
      UserError: If the file is damaged or not a tar archive.
    """
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)  # In repacked archives, names often begin with "./".
                if wanted(name) and member.isfile() and (file := tar.extractfile(member)):
                    yield name, file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged or no tar archive ({reason}): replace it by {archive.url}") from error


def require_members(archive: Archive, path: Path, wanted: Iterable[str], present: Container[str]) -> None:
    """Raises UserError unless all the wanted members are present."""
    missing = [name for name in wanted if name not in present]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{path} lacks the member {', '.join(missing[:5])}{more}: replace it by {archive.url}")


def text_lines(data: bytes) -> list[str]:
    """Returns the lines of a member that are not empty, without the white space around them."""
    return [line.strip() for line in data.decode("utf-8", errors="replace").splitlines() if line.strip()]


def check_names(path: Path, member: str, names: list[str], expected: int) -> None:
    """Raises UserError unless there are `expected` different names."""
    if len(names) != expected or len(set(names)) != expected:
        raise UserError(
            f"{path}: member {member} should hold {expected} different label names, one a line: "
            f"it has {len(names)} lines, {len(set(names))} of them different"
        )


def check_categories(path: Path, split: str, names: Sequence[str], labels: np.ndarray) -> None:
    """Raises UserError unless the labels of a split, int [N], include every class."""
    missing = np.setdiff1d(np.arange(len(names)), labels)
    if len(missing):
        raise UserError(f"{path}: the {split} split has no image of {', '.join(np.array(names)[missing[:5]])}")


def decode(path: Path, member: str, data: bytes) -> Image.Image:
    """Decodes an image file completely and keeps its mode.

    Raises:
      UserError: If it is not a sound image; the message names the archive and the member.
    """
    try:
        image = open_image(io.BytesIO(data))
        image.load()
    # Pillow's decoders raise exceptions of many types.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: member {member} is not a sound image ({reason})") from error
    return image
