"""Files written into folders that strangers may have filled: no symbolic link is followed out of them."""

import errno
import json
import os
import pathlib
import re
import secrets
from collections.abc import Iterable
from typing import Any, TextIO

from cskd_jax.errors import UserError


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old one or the whole new one; a link in its place is replaced.

    Args:
      path: of the file; what it was before, or what a link there points to, is not touched.
      content: all of it.
    """
    # A name that nobody can have put a link at; "x" would refuse it besides.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """`write_bytes` of text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: pathlib.Path, content: Any) -> None:
    """`write_text` of JSON; ValueError where a number is not finite."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def open_append(path: pathlib.Path) -> TextIO:
    """Opens a text file to append to and to read, made if missing; UserError if it is a symbolic link."""
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
        raise UserError(f"{path} is a symbolic link, and nothing is written through one: remove it")


def refuse_links(paths: Iterable[pathlib.Path]) -> None:
    """Raises UserError if one of the paths, or anything in the folders among them, is a symbolic link."""
    for path in paths:
        refuse_link(path)
        if path.is_dir():
            refuse_links(path.iterdir())


def local_folder(path: str | pathlib.Path) -> pathlib.Path:
    """Returns the path of a folder, with ~ expanded; raises UserError for an address such as gs://bucket/run.

    Args:
      path: Text as it was typed. A `Path` of an address has lost one of its slashes, and is recognized nevertheless.
    """
    address = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(path))
    if address:
        raise UserError(
            f"{path} is an address, not a folder: name a local or a mounted folder, and copy it from or to "
            f"{address[1]}:// by other means, such as gcloud storage or rclone"
        )
    return pathlib.Path(path).expanduser()
