"""Settings of networks besides their name and width, such as the patch size of a Vision Transformer."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """A rule for the value of a setting.

    Attributes:
      types: Allowed types of the value. The first one is the type of the setting.
      test: Function that returns whether a value of one of these types is allowed.
      allowed: The allowed values in words, for error messages.
    """

    types: tuple[type, ...]
    test: Callable[[Any], bool]
    allowed: str

    def allows(self, value: Any) -> bool:
        """Returns whether the setting may have this value."""
        # bool is an int in Python, but never means a number here.
        right_type = isinstance(value, self.types) and (not isinstance(value, bool) or bool in self.types)
        return right_type and self.test(value)
