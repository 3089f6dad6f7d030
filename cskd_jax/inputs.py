"""Reads files that anyone may have made: regular files of a bounded size, JSON and its types, and zip archives."""

import errno
import io
import json
import math
import os
import pathlib
import re
import stat
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

from cskd_jax.errors import UserError

# Results of runs with thousands of classes take less than one megabyte.
MAX_JSON = 8 << 20
# Characters in a name or a path.
MAX_TEXT = 10_000
# Digits of a number in JSON: those of the largest 64-bit integers, and those of a float with its exponent.
_MAX_DIGITS = 40
# Nesting depth of lists and objects; the files of this package have at most five levels.
_MAX_DEPTH = 50
# The list of the members of an archive takes about a hundred bytes for each; an archive of ImageNet's size has 16 MB.
_MAX_DIRECTORY = 32 << 20
# How a member begins in the list, and the length of what precedes its name.
_MEMBER, _MEMBER_BYTES = b"PK\1\2", 46
# Bytes of the extra fields of a member, such as its times and owner.
_MAX_EXTRA = 1_000
# Size of a file from which it may not consist mostly of holes.
_MAX_HOLES = 256 << 20
_CHUNK = 1 << 20
# NUL, and the surrogates that do not stand for a byte that is not UTF-8.
_NO_PATH = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")


def open_regular(path: str | pathlib.Path, limit: int) -> io.BufferedReader:
    """Opens a file for reading without ever waiting, even if it is a pipe or a device.

    Args:
      path: Path of the file; a symbolic link is followed.
      limit: Largest size in bytes.

    Raises:
      UserError: It is not a regular file, it is larger than the limit, or it is large and consists mostly of holes.
      OSError: It cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file but a folder, a pipe, a device or similar")
        if status.st_size > limit:
            raise UserError(f"{path} has {status.st_size:,} bytes; at most {limit:,} are allowed")
        if status.st_size > _MAX_HOLES and _is_hollow(descriptor, status.st_size):
            raise UserError(f"{path} is {status.st_size:,} bytes large, but most of them were never written")
    except BaseException:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def _is_hollow(descriptor: int, size: int) -> bool:
    """Returns whether most of an opened file are holes, which take no space and cost time and memory to read."""
    data = position = 0
    try:
        while 2 * data < size:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            position = os.lseek(descriptor, start, os.SEEK_HOLE)
            data += position - start
    except OSError as error:
        return error.errno == errno.ENXIO  # There is no more data; other errors are those of unusual file systems.
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return False


def read_bytes(path: str | pathlib.Path, limit: int) -> bytes:
    """Returns the content of a file; the arguments and errors are those of `open_regular`."""
    with open_regular(path, limit) as file:
        data = file.read(limit + 1)
    if len(data) > limit:  # It is growing, or its file system does not report its size.
        raise UserError(f"{path} has more than {limit:,} bytes, the maximum")
    return data


def parse_json(data: bytes | str) -> Any:
    """Returns a JSON value whose numbers are finite and whose nesting is bounded.

    Raises:
      ValueError: It is damaged, nested too deeply, or holds NaN, an infinity, or a number with too many digits.
    """
    try:
        value = json.loads(data, parse_int=_integer, parse_float=_float, parse_constant=_float)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _parts(outer)]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _parts(value):
    return value.values() if isinstance(value, dict) else value


def _integer(text):
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"it holds a number with {len(text)} digits")
    return int(text)


def _float(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text[:_MAX_DIGITS]}, which is not a finite number")
    return value


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file; raises UserError if the file is damaged."""
    try:
        found = parse_json(read_bytes(path, MAX_JSON))
    except ValueError as error:
        raise UserError(f"{path} is damaged: not a JSON object ({str(error)[:200]})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: not a JSON object")
    return found


Test = Callable[[Any], bool]


def is_text(value: Any) -> bool:
    """Returns whether a JSON value is a string of a length, and of characters, that names and paths have."""
    return type(value) is str and len(value) <= MAX_TEXT and not _NO_PATH.search(value)


def is_count(value: Any, low: int = 0) -> bool:
    """Returns whether a JSON value is an integer from `low` that 64 bits hold."""
    return type(value) is int and low <= value < 2**63


def is_number(value: Any) -> bool:
    """Returns whether a JSON value is a number that can be used in calculations."""
    return type(value) in (int, float) and abs(value) < 1e30


def is_map(test: Test) -> Test:
    """Returns a test of whether a JSON value is an object whose values all pass a test."""
    return lambda value: isinstance(value, dict) and all(map(test, value.values()))


def is_list(test: Test) -> Test:
    """Returns a test of whether a JSON value is a list whose elements all pass a test."""
    return lambda value: isinstance(value, list) and all(map(test, value))


def is_optional(test: Test) -> Test:
    """Returns a test of whether a JSON value is null or passes a test."""
    return lambda value: value is None or test(value)


def unsound(values: Any, needed: Mapping[str, Test], optional: Mapping[str, Test] | None = None) -> list[str]:
    """Returns the keys of a JSON object that are missing or do not pass their test; all if it is not an object.

    Args:
      values: JSON value.
      needed: Test of each key that the object must have.
      optional: Test of each key that it may have; other keys are ignored.
    """
    if not isinstance(values, dict):
        return [*needed, *(optional or {})]
    wrong = [key for key, test in needed.items() if key not in values or not test(values[key])]
    return wrong + [key for key, test in (optional or {}).items() if key in values and not test(values[key])]


class _BoundedReads:
    """A file that refuses to read more at once than the list of the members of an archive should take.

    Until it is `opened`, it also refuses a list whose members have many extra fields, which zipfile reads slowly.
    """

    def __init__(self, file):
        self.opened = False
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, file.close
        self._read = file.read

    def read(self, size=-1):
        data = self._read(min(size, _MAX_DIRECTORY + 1) if size >= 0 else _MAX_DIRECTORY + 1)
        if len(data) > _MAX_DIRECTORY:
            raise zipfile.BadZipFile("part of it is too large")
        position = 0
        while not self.opened and data[position : position + 4] == _MEMBER:
            name, extra, comment = struct.unpack_from("<3H", data, position + 28)
            if extra > _MAX_EXTRA:
                raise zipfile.BadZipFile(
                    f"a member has {extra:,} bytes of extra fields; at most {_MAX_EXTRA:,} are allowed"
                )
            position += _MEMBER_BYTES + name + extra + comment
        return data


def zip_of(file: io.BufferedReader) -> zipfile.ZipFile:
    """Returns the zip archive in a file, whose list of members is bounded; zipfile's errors are of many types.

    Args:
      file: File that `open_regular` has opened.
    """
    bounded: Any = _BoundedReads(file)
    archive = zipfile.ZipFile(bounded)
    bounded.opened = True
    return archive


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    """Returns the bytes of a member, whose checksum zipfile compares.

    Args:
      archive: Archive of `zip_of`.
      member: Member of the archive.
      limit: Largest size of the member in bytes.

    Raises:
      BadZipFile: The member is larger, or compressed by a method other than zip's own. The other methods can turn a few
        bytes into gigabytes before a size is checked.
    """
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"compression method {member.compress_type}; only 0 and 8 are supported")
    if member.file_size > limit:
        raise zipfile.BadZipFile(f"it has {member.file_size:,} bytes; at most {limit:,} are allowed")
    parts = []
    with archive.open(member) as file:
        while part := file.read(_CHUNK):
            parts.append(part)
    return b"".join(parts)
