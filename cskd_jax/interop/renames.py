"""Names that a file gives to its tensors, turned into those that a network is known by: prefixes and renaming rules."""

import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from cskd_jax.errors import UserError, printable
from cskd_jax.inputs import read_bytes

# A pair (regular expression, replacement).
Rule = tuple[str, str]
# The replacement by which a rule leaves a tensor out.
LEAVE_OUT = "-"
# The names under which wrappers and training code hold a network.
_WRAPPERS = ("_orig_mod", "module", "model", "student", "teacher")
_MAX_WRAPPERS, _MAX_BYTES, _MAX_RULES = 3, 65_536, 1_000
# A pattern that repeats a group, or repeats many times, may search for longer than anyone waits.
_MAX_REPETITIONS = 3


def read_rules(path: pathlib.Path) -> list[Rule]:
    """Reads a file of renaming rules.

    A line holds a regular expression and its replacement, with white space between the two. Empty lines, and lines that
    begin with #, are ignored. `rename` applies the rules in their order.

    Raises:
      UserError: If the file is no such text, or a pattern is invalid or could take too long.
      OSError: If the file cannot be read.
    """
    lines = read_bytes(path, _MAX_BYTES).decode("utf-8", errors="replace").splitlines()
    if len(lines) > _MAX_RULES:
        raise UserError(f"{path} has more than {_MAX_RULES} lines, too many for a file of names")
    rules = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split()
        if len(words) != 2:
            raise UserError(f"{path}, line {number}: {printable(line)!r} is not a pattern and its replacement")
        try:
            _check(*words)
        except (re.error, UserError) as error:
            raise UserError(f"{path}, line {number}: {printable(line)!r} does not work: {error}") from None
        rules.append((words[0], words[1]))
    return rules


def _check(pattern: str, replacement: str) -> None:
    """Raises `re.error` or UserError unless a rule is sound and ends soon."""
    compiled = re.compile(pattern)
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > _MAX_REPETITIONS:
        raise UserError(f"it repeats a group, or has more than {_MAX_REPETITIONS} of * + {{, and may take forever")
    groups = [int(number) for number in re.findall(r"\\(\d+)", replacement)]
    if re.sub(r"\\\d+", "", replacement).count("\\") or any(not 1 <= group <= compiled.groups for group in groups):
        raise UserError(
            rf"the replacement may refer to its {compiled.groups} groups as \1, \2, ..., and to nothing else"
        )


def rename(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, str]:
    """Applies rules to names, each to what the one before has made.

    Args:
      names: Names in a file.
      rules: Pairs (regular expression, replacement); what the expression finds is replaced, wherever it is in the name.
        The replacement "-" leaves the tensor out.

    Returns:
      {new name: name in the file}.

    Raises:
      UserError: If two names become the same.
    """
    sources: dict[str, str] = {}
    for name in names:
        new = _renamed(name, rules)
        if new in sources:
            raise UserError(f"{sources[new]} and {name} are both names of {new}")
        if new is not None:
            sources[new] = name
    return sources


def _renamed(name: str, rules: Sequence[Rule]) -> str | None:
    """Returns a name after all rules; None if one leaves it out."""
    for pattern, replacement in rules:
        if replacement != LEAVE_OUT:
            name = re.sub(pattern, replacement, name)
        elif re.search(pattern, name):
            return None
    return name


def with_prefix(names: Iterable[str], prefix: str) -> dict[str, str]:
    """Returns {name without the prefix: name} of the names that have it."""
    return {name.removeprefix(prefix): name for name in names if name.startswith(prefix) and name != prefix}


def possible_prefixes(names: Mapping[str, object]) -> list[str]:
    """Returns the prefixes of wrappers that names have, such as "module." and "module.student.", with "" first."""
    prefixes = {"": None}
    for name in names:
        words = itertools.takewhile(_WRAPPERS.__contains__, name.split(".")[:_MAX_WRAPPERS])
        prefixes |= dict.fromkeys(itertools.accumulate(f"{word}." for word in words))
    return list(prefixes)


def given_prefix(names: Mapping[str, object], prefix: str) -> str:
    """Returns a prefix that the user gave, as the names have it.

    Reading a file removes the prefixes of wrappers that all names have; a prefix may still begin with them.

    Raises:
      UserError: If no name has the prefix.
    """
    words = prefix.rstrip(".").split(".")
    while words:
        shortened = ".".join(words) + "."
        if with_prefix(names, shortened):
            return shortened
        if words.pop(0) not in _WRAPPERS:
            break
    else:
        return ""
    begins = ", ".join(dict.fromkeys(name.split(".")[0] for name in itertools.islice(names, 1000)))
    raise UserError(f"no tensor has a name that begins with {prefix}; names begin with {begins[:200]}")
