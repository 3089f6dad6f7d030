"""Exceptions that the commands show as one line, each with its exit code, and what their messages are made with."""

import difflib
from collections.abc import Iterable

# Share of common letters from which two names are taken for alike: below it, adamw would be momentum.
_ALIKE = 0.75


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


def close_to(name: str, known: Iterable[str]) -> list[str]:
    """Returns what was probably meant by a name that does not exist: at most three of `known`, the likeliest first.

    Names are close if they are spelled alike, or if one begins with the other; case, hyphens and underscores make no
    difference at all. Nothing is better than something that means something else.
    """
    likeness = {other: _likeness(name, other) for other in known}
    least = 1.0 if 1.0 in likeness.values() else _ALIKE
    return sorted((k for k, value in likeness.items() if value >= least), key=lambda k: -likeness[k])[:3]


def _likeness(name: str, other: str) -> float:
    """Returns how alike two names are, from 0 to 1."""
    name, other = (text.lower().replace("-", "").replace("_", "") for text in (name, other))
    begins = min(len(name), len(other)) >= 3 and (name.startswith(other) or other.startswith(name))
    return max(difflib.SequenceMatcher(None, name, other).ratio(), _ALIKE if begins else 0.0)
