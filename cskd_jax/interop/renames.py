"""Converts the tensor names in a file to the names by which a network is known: prefixes and renaming rules."""

import functools
import itertools
import math
import pathlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence

from cskd_jax.errors import UserError, printable
from cskd_jax.inputs import read_bytes

# A pair (regular expression, replacement).
Rule = tuple[str, str]
# The replacement by which a rule leaves a tensor out.
LEAVE_OUT = "-"
# The wrappers that reading a file removes.
_REMOVED = ("_orig_mod", "module")
# The names under which wrappers and training code store a network.
_WRAPPERS = ("_orig_mod", "module", "model", "student", "teacher")
_MAX_WRAPPERS, _MAX_BYTES, _MAX_RULES = 3, 65_536, 1_000
# A pattern that repeats a group, or repeats or chooses many times, may take impractically long to match.
_MAX_REPETITIONS, _MAX_CHOICES = 3, 8
# Limits on the length of a name that rules have changed, on the ways to match a name, which take three seconds, and on
# the time that all names take.
_MAX_NAME, _MAX_WAYS, _MAX_SECONDS = 1_000, 2**26, 5
# Parts of a pattern that repeat, and those that choose: a question mark after ( or another repetition does neither.
_REPETITIONS, _CHOICES = re.compile(r"[*+{]"), re.compile(r"(?<![(*+?}])\?|\|")
_REFERENCES = re.compile(r"\\[1-9]|\(\?P=")


def read_rules(path: pathlib.Path) -> list[Rule]:
    """Reads a file of renaming rules.

    Each line holds a regular expression and its replacement, separated by whitespace. Empty lines and lines that begin
    with # are ignored. `rename` applies the rules in order.

    Raises:
      UserError: If the file is not such a text, or if a pattern is invalid or could take too long.
      OSError: If the file cannot be read.
    """
    lines = read_bytes(path, _MAX_BYTES).decode("utf-8-sig", errors="replace").splitlines()
    if len(lines) > _MAX_RULES:
        raise UserError(f"{path} has more than {_MAX_RULES} lines, the maximum for a file of names")
    rules = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split()
        if len(words) != 2:
            raise UserError(f"{path}, line {number}: {printable(line[:500])!r} is not a pattern and a replacement")
        try:
            _check(*words)
        except (re.error, RecursionError, OverflowError, UserError) as error:
            raise UserError(f"{path}, line {number}: {printable(line[:500])!r} is not a valid rule: {error}") from None
        rules.append((words[0], words[1]))
    return rules


def _check(pattern: str, replacement: str) -> None:
    """Raises UserError, or the errors of `re.compile`, unless a rule is valid and can finish quickly."""
    if re.search(r"\)[*+{]", pattern) or len(_REPETITIONS.findall(pattern)) > _MAX_REPETITIONS:
        raise UserError(f"it repeats a group, or has more than {_MAX_REPETITIONS} of * + {{, and may take forever")
    if len(_CHOICES.findall(pattern)) > _MAX_CHOICES:
        raise UserError(f"it has more than {_MAX_CHOICES} of ? |, and may take forever")
    compiled = re.compile(pattern)
    groups = re.findall(r"\\(\d+)", replacement)
    valid = all(len(group) < 4 and 1 <= int(group) <= compiled.groups for group in groups)
    if re.sub(r"\\\d+", "", replacement).count("\\") or not valid:
        raise UserError(
            rf"the replacement may refer only to the {compiled.groups} groups of the pattern, as \1, \2, ..."
        )


def rename(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, str]:
    """Applies rules to names, each to the result of the previous one.

    Args:
      names: Names in a file.
      rules: Pairs (regular expression, replacement); every match of the expression is replaced, wherever it is in the
        name. The replacement "-" leaves the tensor out.

    Returns:
      {new name: name in the file}.

    Raises:
      UserError: If two names become the same, if a name becomes too long, or if it could take too long.
    """
    sources: dict[str, str] = {}
    end = time.monotonic() + _MAX_SECONDS
    for name in names:
        new = _renamed(name, rules, end)
        if new in sources:
            raise UserError(f"{sources[new]} and {name} both become {new}")
        if new is not None:
            sources[new] = name
    return sources


def _renamed(name: str, rules: Sequence[Rule], end: float) -> str | None:
    """Returns a name after all rules, which have until the time `end`; None if a rule leaves it out."""
    for pattern, replacement in rules:
        if _ways(pattern, len(name)) > _MAX_WAYS or time.monotonic() > end:
            raise UserError(f"the renaming rules take too long, such as {pattern}: use fewer of * + {{ ? |")
        if replacement == LEAVE_OUT:
            if re.search(pattern, name):
                return None
            continue
        new = re.sub(pattern, replacement, name)
        if len(new) > max(_MAX_NAME, len(name)):
            raise UserError(f"{name} becomes a name of {len(new):,} characters; at most {_MAX_NAME:,} are allowed")
        name = new
    return name


@functools.cache
def _ways(pattern: str, length: int) -> int:
    """Returns about how many ways there are, at most, to match a pattern in a name of this length."""
    repetitions = len(_REPETITIONS.findall(pattern)) + bool(_REFERENCES.search(pattern))
    return 2 ** len(_CHOICES.findall(pattern)) * math.comb(length + repetitions + 1, repetitions + 1)


def with_prefix(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Returns {name without the prefix: name} for the names that have the prefix."""
    return {name.removeprefix(prefix): name for name in names if name.startswith(prefix) and name != prefix}


def possible_prefixes(names: Mapping[str, object]) -> list[str]:
    """Returns the wrapper prefixes that occur in names, such as "module." and "module.student.", with "" first."""
    prefixes = {"": None}
    for name in names:
        words = itertools.takewhile(_WRAPPERS.__contains__, name.split(".")[:_MAX_WRAPPERS])
        prefixes |= dict.fromkeys(itertools.accumulate(f"{word}." for word in words))
    return list(prefixes)


def given_prefix(names: Mapping[str, object], prefix: str) -> str:
    """Returns a prefix given by the user in the form that occurs in the names.

    Reading a file removes the wrapper prefixes that all names share; a given prefix may still begin with them.

    Raises:
      UserError: If no name has the prefix.
    """
    words = prefix.rstrip(".").split(".")
    while words:
        shortened = ".".join(words) + "."
        if with_prefix(names, shortened):
            return shortened
        if words.pop(0) not in _REMOVED:
            break
    else:
        return ""
    begins = ", ".join(dict.fromkeys(name.split(".")[0] for name in itertools.islice(names, 1000)))
    raise UserError(f"no tensor has a name that begins with {prefix}; names begin with {begins[:200]}")
