"""Writes files into folders from untrusted sources and walks them, without following symbolic links out of them."""

import csv
import errno
import io
import json
import os
import pathlib
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from cskd_jax.errors import UserError, printable

# A spreadsheet takes text for a formula if it begins with one of these or its full-width form.
_FORMULAS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_MAX_DEPTH = 100  # of folders


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file atomically; a symbolic link in its place is replaced.

    Args:
      path: Path of the file. The target of a link there is not touched.
      content: Content of the whole file.
    """
    # Nobody can have put a link at this name, and "x" would refuse it as well.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # Python names no file for an error in writing.
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes text in UTF-8 as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON as `write_text` does; raises ValueError if a number is not finite."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def csv_text(rows: Iterable[Sequence[Any]], line_end: str = "\n") -> str:
    """Returns rows as CSV that no spreadsheet executes.

    Text becomes `printable`, and text that looks like a formula is preceded by an apostrophe.

    Args:
      rows: Cells of each row.
      line_end: End of a line.
    """
    text = io.StringIO()
    csv.writer(text, lineterminator=line_end).writerows([_disarm(cell) for cell in row] for row in rows)
    return text.getvalue()


def _disarm(cell):
    if not isinstance(cell, str):
        return cell
    text = printable(cell)
    return f"'{text}" if text.lstrip().startswith(_FORMULAS) else text


def open_append(path: pathlib.Path) -> TextIO:
    """Opens a text file for appending and reading, creating it if needed; raises UserError for a symbolic link."""
    try:
        return open(path, "a+", encoding="utf-8", opener=_open_no_link)
    except OSError as error:
        if error.errno == errno.ELOOP:
            refuse_link(path)
        raise


def _open_no_link(path, flags):
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def refuse_link(path: pathlib.Path) -> None:
    """Raises UserError if `path` is a symbolic link."""
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, and files are never written through links: remove it")


def refuse_other_kinds(files: Iterable[pathlib.Path], folders: Iterable[pathlib.Path]) -> None:
    """Raises UserError if something else is where files and folders are to be written, so that it is known in time."""
    for path in files:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file, but a file must be written there: remove it")
    for path in folders:
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is not a folder, but files must be written into it: remove it")


def refuse_links(paths: Iterable[pathlib.Path]) -> None:
    """Raises UserError if one of the paths, or anything in the folders among them, is a symbolic link."""
    for path in paths:
        refuse_link(path)
        if path.is_dir():
            for entry in entries_below(path):
                refuse_link(pathlib.Path(entry.path))


def entries_below(folder: str | pathlib.Path, *, skip_unreadable: bool = False) -> Iterator[os.DirEntry[str]]:
    """Yields everything below a folder, in no particular order; links to folders are yielded but not followed.

    Args:
      folder: Folder, which may be a link itself.
      skip_unreadable: Whether folders that cannot be listed are passed over instead of raising OSError.

    Raises:
      UserError: Folders are nested more than `_MAX_DEPTH` deep.
    """
    waiting = [(os.fspath(folder), 1)]
    while waiting:
        path, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise UserError(f"{folder} holds folders that are nested more than {_MAX_DEPTH} deep, the maximum")
        try:
            with os.scandir(path) as found:
                entries = list(found)
        except OSError:
            if not skip_unreadable:
                raise
            continue
        yield from entries
        waiting += [(entry.path, depth + 1) for entry in entries if entry.is_dir(follow_symlinks=False)]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry is a folder or a link to one; False for a link that leads in a circle."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def local_folder(path: str | pathlib.Path) -> pathlib.Path:
    """Returns the path of a folder, which need not exist, with ~ expanded.

    Args:
      path: Text as it was typed, or a `Path`. An address that lost a slash by becoming a `Path` is recognized as well.

    Raises:
      UserError: It is empty, an address such as gs://bucket/run, or a file, or it is not valid UTF-8, which the
        libraries that write into it need.
    """
    if path == "":
        raise UserError("the name of a folder is empty; the current folder is named .")
    address = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(path))
    if address:
        raise UserError(
            f"{path} is a URL, not a folder: name a local or mounted folder, and copy it from or to {address[1]}:// "
            "with another tool, such as gcloud storage or rclone"
        )
    folder = full_path(path)
    try:
        str(folder.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"the path of the folder {folder} is not valid UTF-8: rename it") from None
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"{path} is a file, not a folder")
    return folder


def full_path(path: str | pathlib.Path) -> pathlib.Path:
    """Returns a path with ~ expanded; raises UserError if there is no home folder, as in many containers."""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        user = pathlib.Path(path).parts[0].removeprefix("~")
        why = f"there is no user {user}" if user else "there is no home folder (HOME is not set)"
        raise UserError(f"{path}: {why}; give the full path of the folder") from None
