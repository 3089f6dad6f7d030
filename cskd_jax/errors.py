"""Exceptions that the commands show as one line, each with its exit code, and helpers for their messages."""

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator
from typing import Any

# Smallest share of common letters at which two names count as alike; below it, momentum would be suggested for adamw.
_ALIKE = 0.75
# Errors of reading that may not recur: a lost server, too many open files, no memory.
_TRANSIENT = {errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# Length of the longest message; the longest list of allowed values takes a third of it.
_LONGEST = 2000


class UserError(Exception):
    """An error that the user can fix: a bad configuration, bad data, or an unsuitable path.

    The message is one line that names what is wrong and what is allowed. It may quote untrusted text, so it is always
    `printable`, and shortened if it is long.
    """

    exit_code = 2

    def __str__(self) -> str:
        return as_message(super().__str__())


class DivergedError(UserError):
    """An error for a loss or gradient that is not finite.

    Attributes:
      results: {name: result} of the students that were trained alongside the one that failed.
    """

    exit_code = 3

    def __init__(self, message: str):
        super().__init__(message)
        self.results: dict[str, Any] = {}


class TransientError(UserError):
    """An error that may not occur when the run is started again, such as a killed worker process."""

    exit_code = 1


class InterruptedRun(UserError):
    """An exception for a run that a signal stopped with its state saved, so that the same command resumes it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


@contextlib.contextmanager
def kept_error(owner: Any) -> Iterator[None]:
    """Returns a context that stores a UserError in `owner` instead of raising it, so that the others continue.

    Args:
      owner: Object whose attribute `error` becomes the error. An `InterruptedRun` concerns all of them, so it is
        raised.
    """
    try:
        yield
    except InterruptedRun:
        raise
    except UserError as error:
        owner.error = error


def raise_if_of_system(error: Exception, problem: str) -> None:
    """Raises an error for a failed read that is not a sign of damage: access is denied, or a retry may succeed.

    Args:
      error: What was raised while reading.
      problem: Beginning of the message, such as "cannot read a.png".

    Raises:
      TransientError: There was no memory, a lost server, too many open files, or the like.
      UserError: There is no permission to read it.
    """
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in _TRANSIENT:
        raise TransientError(f"{problem}: {str(error) or 'out of memory'}") from error
    if isinstance(error, PermissionError):
        raise UserError(f"{problem}: {error}") from error


def describe_os_error(error: OSError) -> str:
    """Returns what the system refuses and for which file, such as "No space left on device: a/results.json"."""
    return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")


def shorten(text: str, length: int) -> str:
    """Returns text of at most `length` characters, which ends in an ellipsis if something was left out."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def printable(text: str) -> str:
    r"""Returns untrusted text as one line that is safe to show on a console.

    Line ends, terminal escapes, marks that change the direction of text, and all other unprintable characters become
    visible as Python escapes, such as \x1b.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def as_message(text: str) -> str:
    """Returns untrusted text as a message: one `printable` line, shortened if it is long."""
    return shorten(printable(text), _LONGEST)


def one_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or its type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def close_to(name: str, known: Iterable[str]) -> list[str]:
    """Returns at most three of `known` that an unknown name probably meant, the likeliest first.

    Names are close if they are spelled alike, if one begins with the other, or if the unknown one consists of the
    initials of the other, such as lr for learning_rate; case, hyphens and underscores make no difference. No suggestion
    is better than one with another meaning.
    """
    likeness = {other: _likeness(name, other) for other in known}
    least = 1.0 if 1.0 in likeness.values() else _ALIKE
    return sorted((k for k, value in likeness.items() if value >= least), key=lambda k: -likeness[k])[:3]


def meant(name: str, known: Iterable[str]) -> str:
    """Returns a question with the known names that an unknown one resembles; "" if it resembles none."""
    close = close_to(name, known)
    return f"did you mean {' or '.join(close)}?" if close else ""


def _likeness(name: str, other: str) -> float:
    """Returns how alike two names are, from 0 to 1."""
    initials = "".join(word[:1] for word in other.lower().split("_"))
    name, other = (text.lower().replace("-", "").replace("_", "") for text in (name, other))
    begins = min(len(name), len(other)) >= 3 and (name.startswith(other) or other.startswith(name))
    is_short = len(initials) > 1 and name == initials
    return max(difflib.SequenceMatcher(None, name, other).ratio(), _ALIKE if begins or is_short else 0.0)
