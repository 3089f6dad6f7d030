"""The objects that are made from a PyTorch pickle, and the functions that such a pickle may call."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from cskd_jax.errors import UserError, printable

# No name of a tensor, module or class is longer. Longer strings are read, but not kept as keys.
MAX_NAME = 1024
# Maximum number of elements and characters that all calls and names of a file together may copy.
_MAX_COPIED = 300_000
# Functions that harmless files call and whose results are not read here; a Placeholder takes the place of a result.
_INERT_CALLS = (
    "torch.device",
    "torch.nn.backends.thnn._get_thnn_function_backend",  # in every module before 1.2
    "functools.partial",
    "_codecs.encode",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    # Schedules, command lines and histories, which are often saved along with a network.
    "collections.Counter",
    "collections.deque",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("bytearray", "complex", "frozenset")),
    "builtins.range",
    "__builtin__.xrange",
    "types.SimpleNamespace",
    *(f"datetime.{name}" for name in ("date", "datetime", "timedelta", "timezone")),
    *(f"{module}.{name}Path" for module in ("pathlib", "pathlib._local") for name in ("Posix", "PurePosix", "Windows")),
)


class Storage(NamedTuple):
    """The place of the values of tensors.

    Attributes:
      key: Key of the storage in the file.
      kind: PyTorch's name for its type, such as "FloatStorage".
      size: Number of values.
      start: Start of a view into a storage, in values; `size` is still the size of the whole storage.
    """

    key: str
    kind: str
    size: int
    start: int = 0


class Tensor(NamedTuple):
    """A tensor whose values are not read yet; offset and strides are in values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Global(NamedTuple):
    """A function or class that a pickle names."""

    name: str


class Placeholder:
    """An inert object of a class that the file names.

    Attributes:
      state: Its attributes by name, if they are a dictionary.
    """

    __slots__ = ("state",)

    def __init__(self):
        self.state: dict[str, Any] = {}


class Calls:
    """The functions that a file may call; they count what they copy."""

    def __init__(self):
        self._copied = 0
        self._known: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": self._ordered,
            "collections.defaultdict": lambda *_: {},
            "builtins.set": self._set,
            "__builtin__.set": self._set,
            "torch.Size": self._size,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch.nn.parameter.Parameter": lambda tensor, *_: tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        }

    def call(self, name: str, arguments: Iterable[Any]) -> Any:
        """Returns a stand-in for the result of a function; raises UserError if the function is not allowed."""
        if name in self._known:
            return self._known[name](*arguments)
        if name in _INERT_CALLS:
            return Placeholder()
        raise UserError(
            f"tries to call {shown(name)}, which is not allowed; if the file is yours, save the state dict alone: "
            "torch.save(network.state_dict(), FILE)"
        )

    def count(self, number: int) -> None:
        """Counts values that are about to be copied; raises UserError if they are too many in total."""
        self._copied += number
        if self._copied > _MAX_COPIED:
            raise too_much()

    def _ordered(self, pairs=()):
        pairs, found = pairs.items() if isinstance(pairs, dict) else pairs, {}
        self.count(len(pairs))
        for key, value in pairs:
            set_items(found, [key, value])
        return found

    def _set(self, values=()):
        self.count(len(values))
        return set(filter(is_name, values))

    def _size(self, numbers=()):
        self.count(len(numbers))
        return tuple(numbers)

    def _tensor(self, storage, offset, shape, strides, *_):
        if not isinstance(storage, Storage):
            raise UserError("holds a tensor without a storage")
        shape, strides = self._size(shape), self._size(strides)
        numbers = (storage.start, offset, *shape, *strides)
        if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers):
            raise UserError("holds a tensor with invalid sizes")
        return Tensor(storage, storage.start + offset, shape, strides)


def is_name(value: Any) -> bool:
    """Returns whether a value may be a name: a string that is not too long."""
    return type(value) is str and len(value) <= MAX_NAME


def set_items(target: Any, values: list[Any]) -> None:
    """Sets alternating keys and values; only names are kept as keys, since nothing is looked up by any other key."""
    if isinstance(target, dict):
        target.update((key, value) for key, value in zip(values[::2], values[1::2], strict=True) if is_name(key))
    elif not isinstance(target, Placeholder):
        raise ValueError(f"{type(target).__name__} takes no keys")


def too_much() -> UserError:
    """Returns the error for a file that exceeds a limit."""
    return UserError("would use too much memory")


def shown(text: str) -> str:
    """Returns a string from a file in a form that a message may show: short and printable."""
    return printable(text[:200])
