"""Rules for the values of settings. Errors name the key, the value, and what is allowed."""

import ast
import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args, get_origin

from cskd_jax.errors import UserError, meant, shorten
from cskd_jax.losses.base import Count, Fraction, Positive, Share, Signed


class Rule(NamedTuple):
    """A rule that a value must follow.

    Attributes:
      types: Allowed types of the value. The first one is the type of the key.
      test: Function that returns whether a value of these types is allowed.
      allowed: The allowed values in words, for error messages.
      listed_in: Page that lists the allowed values, for documentation, if `allowed` is too long for a table.
      names: The allowed strings, if there are only these, from which errors suggest the nearest.
    """

    types: tuple[type, ...]
    test: Callable[[Any], bool]
    allowed: str
    listed_in: str = ""
    names: tuple[str, ...] = ()


def integer(low: int, high: int = 10**6) -> Rule:
    """Returns the rule for an integer from `low` to `high`."""
    return Rule((int,), lambda value: low <= value <= high, f"an integer from {low} to {high}")


def one_of(*values: str, listed_in: str = "") -> Rule:
    """Returns the rule for one of several strings."""
    return Rule((str,), lambda value: value in values, "one of " + ", ".join(sorted(values)), listed_in, values)


def optional(rule: Rule) -> Rule:
    """Returns a rule that allows None in addition to what `rule` allows."""
    return Rule(
        (*rule.types, type(None)),
        lambda value: value is None or rule.test(value),
        f"{rule.allowed}, or None",
        rule.listed_in and f"{rule.listed_in}, or None",
        rule.names,
    )


def _is_finite(value):
    """Returns whether a number is finite as a float, which math.isfinite does not tell of a large integer."""
    return abs(value) <= sys.float_info.max


BOOL = Rule((bool,), lambda _: True, "true or false")
TEXT = Rule((str,), bool, "a non-empty string")
POSITIVE = Rule((float, int), lambda value: 0 < value < math.inf, "a number greater than 0")
UP_TO_100 = Rule((float, int), lambda value: 0 <= value <= 100, "a number from 0 to 100")
NOT_NEGATIVE = Rule((float, int), lambda value: 0 <= value < math.inf, "a non-negative number")
WIDTH = Rule((float, int), lambda value: 0 < value <= 64, "a number greater than 0, up to 64")
FRACTION = Rule((float, int), lambda value: 0 <= value < 1, "a number in [0, 1)")
SHARE = Rule((float, int), lambda value: 0 <= value <= 1, "a number in [0, 1]")
AREA = Rule((float, int), lambda value: 0 < value <= 1, "a number greater than 0, up to 1")
COUNT = Rule((int,), lambda value: value >= 1, "a positive integer")
CHANNELS = Rule(
    (tuple,),
    lambda value: value and all(isinstance(v, int | float) and _is_finite(v) for v in value),
    "finite numbers in parentheses, such as (0.5,) or (0.49,0.48,0.45)",
)
DEVIATIONS = Rule(
    (tuple,),
    lambda value: CHANNELS.test(value) and min(value) > 0,
    "positive numbers in parentheses, such as (0.5,) or (0.2,0.2,0.2)",
)
TEXTS = Rule(
    (tuple,),
    lambda value: all(isinstance(v, str) and v for v in value),
    "non-empty strings in parentheses, such as ('a',) or ('a','b')",
)
SHARES = Rule(
    (tuple,),
    lambda value: (
        not value or (all(type(v) in (int, float) and v >= 0 and _is_finite(v) for v in value) and sum(value) > 0)
    ),
    "non-negative numbers in parentheses, such as (1,1) or (0.3,0.7), not all of them 0",
)
SIDES = Rule(
    (tuple,),
    lambda value: all(type(v) is int and 0 <= v <= 4096 for v in value),
    "integers from 0 to 4096 in parentheses, such as (0,224)",
)
LOSS_TEACHER = Rule(
    (str,),
    lambda value: value == "average" or (value.isdecimal() and len(value) <= 9),
    "average, or the number of a teacher (counted from 0)",
)
EPOCHS = Rule(
    (tuple,),
    lambda value: all(type(v) is int and 0 < v <= 10**6 for v in value) and list(value) == sorted(set(value)),
    "increasing epochs up to 1000000 in parentheses, such as (100,150)",
)

_OF_TYPES = {
    bool: BOOL,
    int: Rule((int,), lambda value: value >= 0, "a non-negative integer"),
    float: NOT_NEGATIVE,
    str: TEXT,
    Positive: POSITIVE,
    Fraction: FRACTION,
    Share: SHARE,
    Signed: Rule((float, int), _is_finite, "a finite number"),
    Count: COUNT,
}


def of_field(field: dataclasses.Field) -> Rule | None:
    """Returns the rule for a hyperparameter of a loss, which follows from the type of its field, `T` or `T | None`.

    Hyperparameters of losses are never infinite, and only those that say so may be negative.

    Args:
      field: Field of a loss.

    Returns:
      The rule if T is bool, int, float, str, a literal, or a type of `cskd_jax.losses.base`; None for any other T.
    """
    kind, *others = get_args(field.type) if type(None) in get_args(field.type) else (field.type,)
    rule = one_of(*get_args(kind)) if get_origin(kind) is Literal else _OF_TYPES.get(kind)
    return optional(rule) if rule is not None and others else rule


def parse(key: str, text: str, rule: Rule) -> Any:
    """Parses text from the command line as the value of a key, without checking it against the rule.

    Args:
      key: Name of the key, for the message.
      text: Text after `--config.KEY=`.
      rule: Rule of the key, which defines the type.

    Raises:
      UserError: The text is not of that type.
    """
    if text == "None" and type(None) in rule.types:
        return None
    try:
        return _PARSERS.get(rule.types[0], str)(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # Deep nesting raises the last two.
        raise UserError(f"{key} is {shorten(repr(text), 200)}; it must be {rule.allowed}") from None


def _parse_bool(text):
    found = {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
    if found is None:
        raise ValueError
    return found


def _parse_tuple(text):
    value = ast.literal_eval(text)
    repr(value)  # Raises ValueError for numbers of thousands of digits, which no message could show.
    return tuple(value) if isinstance(value, tuple | list) else (value,)


_PARSERS = {bool: _parse_bool, int: int, float: float, tuple: _parse_tuple}


def check(key: str, value: Any, rule: Rule) -> None:
    """Raises UserError unless the value of a key follows its rule."""
    # bool is an int in Python, but never means a number here.
    right_type = isinstance(value, rule.types) and (not isinstance(value, bool) or bool in rule.types)
    if not right_type or not rule.test(value):
        suggested = meant(value, rule.names) if isinstance(value, str) else ""
        raise UserError(f"{key} is {shorten(repr(value), 200)}; {suggested or f'it must be {rule.allowed}'}")
