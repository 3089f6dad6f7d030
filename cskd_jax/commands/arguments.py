"""Parsers for the values of flags, and checks of folders that commands read or write."""

import argparse
import pathlib
import re
from collections.abc import Callable

from cskd_jax.errors import UserError
from cskd_jax.files import local_folder

_MAX_SEEDS = 10_000
_IN_WORDS = {int: "an integer", float: "a number"}


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """Parses an int or float from `low` to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {_IN_WORDS[kind]} from {low} to {high}")
        return value

    return parse


def numbers(kind: type, low: float, high: float) -> Callable[[str], list[float]]:
    """Parses ints or floats from `low` to `high`, separated by commas."""
    parse = number(kind, low, high)
    return lambda text: [parse(part) for part in text.split(",")]


def seeds(text: str, flag: str = "--seeds") -> list[int]:
    """Parses seeds of a flag, separated by commas, including ranges such as 0-2."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last - first >= _MAX_SEEDS:
            raise UserError(f"{flag} is {text}; a range holds at most {_MAX_SEEDS} seeds, such as 0-{_MAX_SEEDS - 1}")
        if not first <= last < 2**32:
            raise UserError(f"{flag} is {text}; it must list integers from 0 to 4294967295, such as 0,1,2 or 0-2")
        found += range(first, last + 1)
    return found


def one_folder(values: argparse.Namespace, *flags: str, example: str) -> pathlib.Path:
    """Returns the folder that a command reads, which is given as a word or by one of several flags.

    Args:
      values: Values of the command line.
      flags: Names of the flags.
      example: Command line that names one, for the message.

    Raises:
      UserError: No folder is given, or several are.
    """
    found = [*values.words, *(getattr(values, flag) for flag in flags if getattr(values, flag) is not None)]
    if len(found) != 1:
        raise UserError(f"name one folder, such as {example}; got {' and '.join(map(str, found)) or 'none'}")
    return local_folder(found[0])


def check_new(folder: pathlib.Path | None) -> None:
    """Raises UserError if the folder of --out is not given, or already exists, so that nothing is overwritten."""
    if folder is None:
        raise UserError("--out is missing; name a new or empty folder, such as --out=exported")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out={folder} already exists; name a new or empty folder")
