"""Reads pickles as PyTorch writes them, without executing anything that they ask for.

A pickle is a program that names functions and classes, and has them called. Here a function that is not on the list of
`TorchUnpickler` is refused, and a class that is not becomes an inert `Placeholder` that only holds its state. A pickled
network thus gives its tensors although its code is not available.
"""

import io
import pickle
import pickletools
from typing import Any, NamedTuple

from cskd_jax.errors import UserError

# Limits on the operations of a pickle, the tuples that it makes, and the elements and letters that its calls and names
# copy. They bound the memory: every other operation makes little, or as much as the file has bytes for it. The second
# also bounds the stack, because the hash of a tuple recurses into the tuples that it holds. ResNet152 has 79,000
# operations and, with Adam's state, 8,100 tuples.
_MAX_OPERATIONS = 5_000_000
_MAX_TUPLES = 30_000
_MAX_COPIED = 300_000
# Functions that harmless files call, with results that are not read here; a Placeholder takes their place.
_INERT_CALLS = (
    "torch.device",
    "torch.nn.backends.thnn._get_thnn_function_backend",  # in every module before 1.2
    "functools.partial",
    "_codecs.encode",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)


# These are tuples, because a pickle can change objects with attributes or a state, but no tuple.


class Storage(NamedTuple):
    """The place of the values of tensors.

    Attributes:
      key: Key of the storage in the file.
      kind: PyTorch's name of its type, such as "FloatStorage".
      size: Number of values.
      start: Start of a view into a storage, in values; its size is still that of the whole storage.
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


class _PlaceholderType(type):
    def __call__(cls, *_, **__):
        if cls.__name__ not in _INERT_CALLS:
            raise UserError(f"asks to call {shown(cls.__name__)}, which is not allowed")
        return object.__new__(cls)


class Placeholder(metaclass=_PlaceholderType):
    """An instance of a class that the file names; it accepts any state and does nothing."""

    def __new__(cls, *_, **__):
        """Makes an instance from any arguments and calls nothing."""
        return object.__new__(cls)

    def __setstate__(self, state):
        if isinstance(state, dict):
            object.__setattr__(self, "__dict__", state)  # Not a copy: many objects can have one state.

    def __setitem__(self, *_):
        pass

    def extend(self, _):
        """Ignores the values of a list."""
        pass


class _Dictionary(dict):
    """An OrderedDict without its attributes, such as the versions in a state dict, which nothing here reads."""

    def __setstate__(self, _):
        pass


class TorchUnpickler(pickle.Unpickler):
    """An unpickler of one pickle from a stream.

    Attributes:
      storages: Storages that the pickle named, by key.
    """

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, encoding="utf-8")
        self.storages: dict[str, Storage] = {}
        self._placeholders: dict[str, _PlaceholderType] = {}
        self._copied = 0
        self._allowed = {
            "collections.OrderedDict": self._ordered,
            "collections.defaultdict": self._dictionary,
            "builtins.set": self._set,
            "__builtin__.set": self._set,
            "torch.Size": self._size,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch.nn.parameter.Parameter": self._parameter,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch._utils._rebuild_parameter_with_state": self._parameter,
        }

    def find_class(self, module: str, name: str) -> Any:
        """Returns the substitute of a function or class that the file names; nothing is imported."""
        full = f"{module}.{name}"
        if module in ("torch", "torch.cuda") and name.endswith("Storage"):
            return name
        if full in self._allowed:
            return self._allowed[full]
        if full not in self._placeholders:
            self._placeholders[full] = _PlaceholderType(self._counted(full), (Placeholder,), {})
        return self._placeholders[full]

    def persistent_load(self, pid: Any) -> Any:
        """Returns an object outside of the pickle: a storage, or a class whose source code the file holds too."""
        if pid[0] == "module":
            return pid[1]
        kind, key, size = pid[1], pid[2], pid[4]
        view = pid[5] if len(pid) > 5 else None
        storage = Storage(key, kind, size, 0 if view is None else view[1])
        types = [(storage.key, str), (storage.kind, str), (storage.size, int), (storage.start, int)]
        if pid[0] != "storage" or any(type(value) is not wanted for value, wanted in types):
            raise UserError("holds something else than storages outside of its pickle")
        self.storages[key] = storage
        return storage

    # These are methods, because a pickle can set attributes of the objects that it gets, but not of a method.

    def _counted(self, values):
        """Counts and returns values that are about to be copied; raises UserError if they are too many in total."""
        self._copied += len(values)
        if self._copied > _MAX_COPIED:
            raise UserError("is built to use too much memory")
        return values

    def _ordered(self, pairs=()):
        return _Dictionary(self._counted(pairs))

    def _dictionary(self, *_):
        return {}

    def _set(self, values=()):
        return set(self._counted(values))

    def _size(self, numbers=()):
        return tuple(self._counted(numbers))

    def _tensor(self, storage, offset, shape, strides, *_):
        if not isinstance(storage, Storage):
            raise UserError("holds a tensor without a storage")
        shape, strides = self._size(shape), self._size(strides)
        numbers = (storage.start, offset, *shape, *strides)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise UserError("holds a tensor with invalid sizes")
        return Tensor(storage, storage.start + offset, shape, strides)

    def _parameter(self, tensor, *_):
        return tensor


def load(stream: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """Reads the pickle at the position of a stream, and leaves the position behind it.

    Returns:
      The content and the storages by key. The content is made of dicts, lists, tuples, sets, texts, numbers, `Tensor`,
      `Storage` and `Placeholder`.

    Raises:
      UserError: If the pickle asks for a call that is not allowed, is damaged, or exceeds a limit.
    """
    try:
        start = stream.tell()
        _check_operations(stream)
        stream.seek(start)
        unpickler = TorchUnpickler(stream)
        return unpickler.load(), unpickler.storages
    except UserError:
        raise
    except Exception as error:  # A damaged pickle makes the unpickler raise errors of any kind.
        raise UserError(f"holds no sound pickle ({type(error).__name__}: {shown(str(error))})") from None


def shown(text: str) -> str:
    """Returns a text of a file in the form in which a message may show it: short and printable."""
    return (text if text.isprintable() else ascii(text))[:200]


def _check_operations(stream):
    """Raises UserError for a pickle that would take too much memory or stack, ValueError for a damaged one."""
    tuples = 0
    for number, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        tuples += operation.name.startswith("TUPLE")
        # The unpickler allocates memory for all numbers below that of an object that it memoizes.
        far = operation.name.endswith("PUT") and (argument or 0) > number
        if far or tuples > _MAX_TUPLES or number > _MAX_OPERATIONS:
            raise UserError("is built to use too much memory")
