"""Original archives of data sets: finding, downloading and reading them without trusting their contents.

An archive is looked for in the data folder and in its subfolder downloads, and downloaded if it is in neither. Its
members are read in memory; nothing is extracted to a path that an archive names.
"""

import contextlib
import dataclasses
import hashlib
import http.client
import io
import logging
import lzma
import os
import posixpath
import re
import secrets
import sys
import tarfile
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from cskd_jax.data.images import MAX_PIXELS, open_image
from cskd_jax.errors import UserError, raise_if_of_system
from cskd_jax.inputs import open_regular, read_member, zip_of

_logger = logging.getLogger(__name__)

TAR_SUFFIXES = (".tar.gz", ".tar", ".tar.xz")
_DOWNLOADS = "downloads"  # Subfolder of the data folder.
_TIMEOUT_SECONDS = 30
_CHUNK_BYTES = 1 << 20
# Limits on what unpacking may take. The archives hold only compressed images, or records that hardly compress.
_MAX_MEMBERS = 30_000
_MAX_ENDS = 100
_MAX_TEXT = 16 << 20
# Parts of a compressed file, bytes that are read of one at once, and memory that xz may take; its strongest level takes
# 65 MiB.
_MAX_PARTS, _PART_BYTES, _MAX_XZ = 10_000, 64 << 10, 256 << 20
# Bytes of a header that holds a name or attributes, and of all of them together.
_MAX_HEADER, _MAX_HEADERS = 64 << 10, 16 << 20
_ATTRIBUTE = re.compile(rb"(\d{1,8}) ([^=]{1,1000})=")
# Members of a tar archive that hold the name or the attributes of the next member, and that tarfile reads whole.
_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


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

    @property
    def limit(self) -> int:
        """Returns how many bytes such an archive may have, and how many it may unpack to."""
        return self.size * 3 // 2 + (64 << 20)


def locate(archive: Archive, data_root: Path) -> tuple[Path, bool]:
    """Finds the archive on disk or downloads it.

    A file whose checksum differs from the official one is accepted with a warning, because its contents are checked
    when it is read.

    Args:
      archive: Archive to find.
      data_root: Data folder.

    Returns:
      The path of the file, and whether it is the official archive.

    Raises:
      UserError: If there is no file and the download failed, or if the file cannot be read.
    """
    path = find_archive(archive, data_root)
    if path is None:
        return download(archive, data_root / _DOWNLOADS), True
    official = sha256(path, archive.limit) == archive.sha256
    if not official:
        _logger.warning("%s is not the official %s: its contents are used after they are checked", path, archive.url)
    return path, official


def find_archive(archive: Archive, data_root: Path) -> Path | None:
    """Returns the archive in the data folder or its subfolder downloads; None if there is none."""
    for folder in (data_root, data_root / _DOWNLOADS):
        for suffix in archive.suffixes:
            path = folder / (archive.stem + suffix)
            if path.is_file():
                return path
    return None


def download(archive: Archive, folder: Path) -> Path:
    """Downloads the official archive.

    Args:
      archive: Archive to download.
      folder: Subfolder of the data folder for the downloaded file; it is created.

    Returns:
      The path of the complete, verified file.

    Raises:
      UserError: If the download failed, or if the downloaded file is not the official archive.
    """
    target = folder / (archive.stem + archive.suffixes[0])
    names = " or ".join(archive.stem + suffix for suffix in archive.suffixes)
    by_hand = f"download it yourself and put it, as {names}, into {folder.parent} or {folder}"
    # Each process has its own file: several may download at once, and the last rename wins with the same bytes. Nobody
    # can have planted a link under its name.
    part = folder / f"{target.name}.{secrets.token_hex(8)}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            digest = _stream(archive, part)
            if digest != archive.sha256:
                raise UserError(
                    f"{archive.url} returned a file with checksum {digest}, not {archive.sha256}: {by_hand}"
                )
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: an invalid proxy or host.
        raise UserError(f"cannot download {archive.url} ({error}): {by_hand}") from error
    return target


def _stream(archive: Archive, part: Path) -> str:
    """Downloads the archive to `part` and returns the SHA-256 of the file."""
    digest = hashlib.sha256()
    _logger.info("downloading %s, %.0f MB", archive.url, archive.size / 1e6)
    with (
        urllib.request.urlopen(archive.url, timeout=_TIMEOUT_SECONDS) as response,
        part.open("xb") as file,
        tqdm(total=archive.size, unit="B", unit_scale=True, desc=archive.stem, disable=not sys.stderr.isatty()) as bar,
    ):
        while chunk := response.read(_CHUNK_BYTES):
            if file.tell() + len(chunk) > archive.limit:
                raise UserError(f"{archive.url} returned more than {archive.limit:,} bytes, too many for the archive")
            file.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def sha256(path: Path, limit: int = sys.maxsize) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits.

    Args:
      path: Path of the file.
      limit: Largest size in bytes.

    Raises:
      UserError: If the file cannot be read or is larger than the limit.
    """
    try:
        with open_regular(path, limit) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_tar(
    archive: Archive, path: Path, wanted: Callable[[str], bool], largest: int
) -> Iterator[tuple[str, bytes | bytearray]]:
    """Yields the normalized name and the bytes of every wanted file of a tar archive, in archive order.

    Args:
      archive: Archive that the file should be, for messages and for its size limit.
      path: Path of a tar archive, compressed with gzip or xz, or uncompressed.
      wanted: Function that tells whether the member with a given name is wanted.
      largest: Largest number of bytes that a wanted member may have.

    Yields:
      Pairs (name, bytes).

    Raises:
      UserError: If the file is damaged, is not a tar archive, or unpacks to more than the archive may.
    """
    try:
        with open_regular(path, archive.limit) as file:
            bounded: Any = _Bounded(_unpacked(file), archive.limit)
            tar: Any
            with _Tar.open(fileobj=bounded, mode="r|", tarinfo=_Member) as tar:
                for number, member in enumerate(tar):
                    tar.members = []  # Otherwise it would remember all of them.
                    name = posixpath.normpath(member.name)  # In repacked archives, names often begin with "./".
                    if number >= _MAX_MEMBERS:
                        raise UserError(f"{path} has more than {_MAX_MEMBERS:,} members: replace it with {archive.url}")
                    if wanted(name) and member.isfile() and (content := tar.extractfile(member)):
                        if member.size > largest:
                            raise UserError(
                                f"{path}: member {name} has {member.size:,} bytes; at most {largest:,} are allowed"
                            )
                        data = bytearray(member.size)
                        if content.readinto(data) != member.size:
                            raise EOFError(f"member {name} is truncated")
                        yield name, data
    except UserError:
        raise
    except Exception as error:  # A damaged archive makes tarfile and the decompressors raise many types of errors.
        raise_if_of_system(error, f"cannot read {path}")
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged or not a tar archive ({reason}): replace it with {archive.url}") from error


def _unpacked(file: io.BufferedReader) -> Any:
    """Returns the content of a file that may be compressed with gzip or xz."""
    start = file.peek(6)[:6]
    if start.startswith(b"\x1f\x8b"):
        return _Unpacked(file, lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS))
    if start == b"\xfd7zXZ\0":
        return _Unpacked(file, lambda: lzma.LZMADecompressor(memlimit=_MAX_XZ))
    return file


class _Unpacked:
    """The content of a compressed file, which consists of a bounded number of parts, perhaps followed by zeros.

    Python's own readers take seconds for millions of empty parts, and for a long name in the header of gzip.
    """

    def __init__(self, file: io.BufferedReader, begin: Callable[[], Any]):
        self._file, self._begin, self._part, self._parts, self._data = file, begin, begin(), 1, b""

    def read(self, size: int) -> bytes:
        while not self._part.eof or self._has_another_part():
            needs_input = getattr(self._part, "needs_input", True)  # zlib, unlike lzma, keeps no input for later.
            data = (self._data or self._file.read(_PART_BYTES)) if needs_input else b""
            unpacked = self._part.decompress(data, size)
            self._data = self._part.unused_data or getattr(self._part, "unconsumed_tail", b"")
            if unpacked:
                return unpacked
            if needs_input and not data:
                raise EOFError("it is truncated")
        return b""

    def _has_another_part(self) -> bool:
        """Returns whether another part follows, and begins it."""
        while not (data := self._data.lstrip(b"\0")):
            self._data = self._file.read(_PART_BYTES)
            if not self._data:
                return False
        self._data, self._part, self._parts = data, self._begin(), self._parts + 1
        if self._parts > _MAX_PARTS:
            raise EOFError(f"it has more than {_MAX_PARTS:,} compressed parts")
        return True


class _Bounded:
    """A stream that raises an error if it has returned more than `limit` bytes, or is read repeatedly past its end."""

    def __init__(self, stream: Any, limit: int):
        self._stream, self._left, self._ends = stream, limit, 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        self._ends += not data
        if self._ends > _MAX_ENDS:  # tarfile skips the terabytes that a member claims block by block.
            raise EOFError("it is truncated")
        if self._left < 0:
            raise tarfile.ReadError("it unpacks to more than the official archive")
        return data


class _Tar(tarfile.TarFile):
    """A tar archive that counts the bytes of the headers that hold names and attributes."""

    header_bytes = 0


class _Member(tarfile.TarInfo):
    """A member whose headers take little time and memory; of their attributes, only the name and size are used."""

    def _proc_member(self, tar: Any) -> tarfile.TarInfo:
        """Returns the member that begins with this header; tarfile calls this for every header."""
        by_tarfile: Any = super()  # Type checkers do not see that it has this method.
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise ValueError("sparse members are not supported")
        if self.type not in _HEADERS:
            return by_tarfile._proc_member(tar)
        tar.header_bytes += max(self.size, 0)
        if not 0 <= self.size <= _MAX_HEADER or tar.header_bytes > _MAX_HEADERS:
            raise ValueError(
                f"a header has {self.size:,} bytes; at most {_MAX_HEADER:,}, and {_MAX_HEADERS:,} together, are allowed"
            )
        if self.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            return by_tarfile._proc_member(tar)
        attributes = _attributes(tar.fileobj.read(_in_blocks(self.size)))
        member = self.fromtarfile(tar)
        if self.type != tarfile.XGLTYPE:
            name = attributes.get(b"path", b"").decode("utf-8", errors="surrogateescape")
            member.name = name.rstrip("/") or member.name
            if b"size" in attributes:
                member.size = int(attributes[b"size"])
                has_data = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
                tar.offset = member.offset_data + (_in_blocks(member.size) if has_data else 0)
        return member


def _in_blocks(size: int) -> int:
    """Returns the bytes that data of this size take in a tar archive."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _attributes(data: bytes) -> dict[bytes, bytes]:
    """Returns {keyword: value} of a header of attributes, which consists of lines LENGTH KEYWORD=VALUE.

    The patterns of Python's tarfile take time that grows with the square of the length.
    """
    found, position = {}, 0
    while match := _ATTRIBUTE.match(data, position):
        position += int(match[1])
        if position <= match.end() or match[2].startswith(b"GNU.sparse."):
            raise ValueError("a header is damaged, or of a sparse member")
        found[match[2]] = data[match.end() : position - 1]
    return found


@contextlib.contextmanager
def open_zip(archive: Archive, path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive; raises UserError if it is damaged or would unpack to more than the official one."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(zip_of(stack.enter_context(open_regular(path, archive.limit))))
        except UserError:
            raise
        except Exception as error:  # A damaged archive makes zipfile raise many types of errors.
            raise_if_of_system(error, f"cannot read {path}")
            raise UserError(
                f"{path} is damaged or not a zip archive ({error}): replace it with {archive.url}"
            ) from error
        unpacked = sum(member.file_size for member in file.infolist())
        if unpacked > archive.limit:
            raise UserError(
                f"{path} unpacks to {unpacked:,} bytes, more than the official archive: replace it with {archive.url}"
            )
        yield file


def read_zipped(
    archive: Archive, path: Path, file: zipfile.ZipFile, member: zipfile.ZipInfo, largest: int = _MAX_TEXT
) -> bytes:
    """Returns the bytes of a member of a zip archive; zipfile verifies its checksum.

    Args:
      archive: Archive that the file should be, for messages.
      path: Path of the file.
      file: The opened file.
      member: Member to read.
      largest: Largest number of bytes that the member may have.

    Raises:
      UserError: If the member is damaged or too large.
    """
    try:
        return read_member(file, member, largest)
    except Exception as error:  # zipfile and the decompressors raise many types of errors.
        raise_if_of_system(error, f"cannot read {path}")
        raise UserError(
            f"{path}: member {member.filename} is damaged ({error}): replace the archive with {archive.url}"
        ) from error


def require_members(archive: Archive, path: Path, wanted: Iterable[str], present: Container[str]) -> None:
    """Raises UserError unless all the wanted members are present."""
    missing = [name for name in wanted if name not in present]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{path} is missing {', '.join(missing[:5])}{more}: replace it with {archive.url}")


def text_lines(data: bytes | bytearray) -> list[str]:
    """Returns the non-empty lines of a member, with surrounding whitespace stripped."""
    return [line.strip() for line in data.decode("utf-8", errors="replace").splitlines() if line.strip()]


def check_names(path: Path, member: str, names: list[str], expected: int) -> None:
    """Raises UserError unless there are `expected` distinct names."""
    if len(names) != expected or len(set(names)) != expected:
        raise UserError(
            f"{path}: member {member} should hold {expected} distinct label names, one per line: "
            f"it has {len(names)} lines, {len(set(names))} of them distinct"
        )


def check_categories(path: Path, split: str, names: Sequence[str], labels: np.ndarray) -> None:
    """Raises UserError unless the labels of a split, int [N], include every class."""
    missing = np.setdiff1d(np.arange(len(names)), labels)
    if len(missing):
        raise UserError(f"{path}: the {split} split has no images of {', '.join(np.array(names)[missing[:5]])}")


def decode(
    path: Path,
    member: str,
    data: bytes | bytearray,
    size: tuple[int, int] | None = None,
    most_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decodes an image file completely, keeping its mode.

    Args:
      path: Path of the archive, for messages.
      member: Name of the member, for messages.
      data: Content of the image file.
      size: Width and height that the image must have, checked before it is decoded; None for any.
      most_pixels: Largest number of pixels.

    Raises:
      UserError: If it is not a valid image; the message names the archive and the member.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow warns about things it can do without.
            image = open_image(io.BytesIO(data), most_pixels)
            size = image.size if size is None else size
            if image.size == size:
                image.load()
                return image
    # Pillow's decoders raise many types of exceptions.
    except Exception as error:
        raise_if_of_system(error, f"cannot read {path}")
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: member {member} is not a valid image ({reason})") from error
    (width, height), (wanted_width, wanted_height) = image.size, size
    raise UserError(f"{path}: member {member} is {width}x{height} pixels, expected {wanted_width}x{wanted_height}")
