"""Exceptions that the commands show as one line, each with its exit code."""

import io
import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Something that the user can mend: bad configuration, bad data, a path that does not fit.

    The message is one line that names what is wrong and what is allowed.
    """

    exit_code = 2


class DivergedError(UserError):
    """Training met a value that is not finite."""

    exit_code = 3


class LostWorkerError(UserError):
    """A process that works for the run was killed: nothing to mend, the run may be started again."""

    exit_code = 1


class InterruptedRun(UserError):
    """A signal asked the run to stop and its state is saved: the same command resumes it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


def printable(text: str) -> str:
    r"""Returns a text from outside as one line that a console only shows.

    Line ends, terminal escapes, marks that turn the direction of text, and all else that is not printable become
    visible as Python would write them, such as \x1b.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def run_command(command: Callable[..., int | None], *arguments: Any) -> int:
    """Runs a command; returns its exit code, or 0. What the user can mend becomes one line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        # A name that the console cannot show should not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return command(*arguments) or 0
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        print(f"error: {printable(f'{error.strerror or error}{place}')}", file=sys.stderr)
        return UserError.exit_code
