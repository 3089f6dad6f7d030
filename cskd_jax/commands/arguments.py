"""What the commands that take no recipe have in common."""

import argparse
import pathlib
from collections.abc import Callable

from cskd_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """Takes arguments as --NAME=VALUE; shows `description` as it is; a mistake is a UserError."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str):
        """Raises UserError with the message."""
        raise UserError(f"{message}; --help shows what is allowed")


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """Parses an int or float from `low` to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return value

    return parse


def numbers(kind: type, low: float, high: float) -> Callable[[str], list[float]]:
    """Parses ints or floats from `low` to `high` with commas between them."""
    parse = number(kind, low, high)
    return lambda text: [parse(part) for part in text.split(",")]


def check_new(folder: pathlib.Path) -> None:
    """Raises UserError if there is something at `folder` already: nothing is overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out={folder} exists already; name a new or empty folder")
