"""Rules for the values of a configuration; every violation names the key, the value, and what is allowed."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from cskd_jax.errors import UserError


class Rule(NamedTuple):
    """What a value must be.

    Attributes:
      types: Types of which the value must be an instance. The first one is the type of the key.
      test: Function that returns whether a value of these types is allowed.
      allowed: The allowed values in words, for error messages.
      listed_in: Page that lists the allowed values, for documentation, where `allowed` is too long for a table.
    """

    types: tuple[type, ...]
    test: Callable[[Any], bool]
    allowed: str
    listed_in: str = ""


def integer(low: int, high: int = 10**6) -> Rule:
    """Returns the rule for an integer from `low` to `high`."""
    return Rule((int,), lambda value: low <= value <= high, f"an integer from {low} to {high}")


def one_of(*values: str, listed_in: str = "") -> Rule:
    """Returns the rule for one of some texts."""
    return Rule((str,), lambda value: value in values, "one of " + ", ".join(sorted(values)), listed_in)


def optional(rule: Rule) -> Rule:
    """Returns a rule that allows None besides what `rule` allows."""
    return Rule(
        (*rule.types, type(None)),
        lambda value: value is None or rule.test(value),
        f"{rule.allowed}, or None",
        rule.listed_in and f"{rule.listed_in}, or None",
    )


BOOL = Rule((bool,), lambda _: True, "True or False")
TEXT = Rule((str,), bool, "a text")
POSITIVE = Rule((float, int), lambda value: 0 < value < math.inf, "a number greater than 0")
NOT_NEGATIVE = Rule((float, int), lambda value: 0 <= value < math.inf, "a number of at least 0")
WIDTH = Rule((float, int), lambda value: 0 < value <= 64, "a number above 0, up to 64")
FRACTION = Rule((float, int), lambda value: 0 <= value < 1, "a number in [0, 1)")
CHANNELS = Rule(
    (tuple,),
    lambda value: value and all(isinstance(v, int | float) and math.isfinite(v) for v in value),
    "a tuple of finite numbers",
)
DEVIATIONS = Rule((tuple,), lambda value: CHANNELS.test(value) and min(value) > 0, "a tuple of numbers above 0")
EPOCHS = Rule(
    (tuple,),
    lambda value: all(type(v) is int and 0 < v <= 10**6 for v in value) and list(value) == sorted(set(value)),
    "an increasing tuple of epochs up to 1000000",
)


_OF_TYPES = {
    bool: BOOL,
    int: Rule((int,), lambda value: value >= 0, "an integer of at least 0"),
    float: NOT_NEGATIVE,
    str: TEXT,
}


def of_field(field: dataclasses.Field) -> Rule:
    """Returns the rule for a hyperparameter of a loss, which follows from the type of its field, `T` or `T | None`.

    No hyperparameter of a loss is a negative or infinite number.
    """
    kinds: tuple[Any, ...] = getattr(field.type, "__args__", None) or (field.type,)
    rule = _OF_TYPES.get(kinds[0]) or Rule((kinds[0],), lambda _: True, f"of type {kinds[0].__name__}")
    return optional(rule) if type(None) in kinds else rule


def check(key: str, value: Any, rule: Rule) -> None:
    """Raises UserError unless the value of a key follows its rule."""
    # bool is an int in Python, but never means a number here.
    right_type = isinstance(value, rule.types) and (not isinstance(value, bool) or bool in rule.types)
    if not right_type or not rule.test(value):
        raise UserError(f"{key} is {value!r}; it must be {rule.allowed}")
