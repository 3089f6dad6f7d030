"""Pickles as PyTorch writes them, read without executing anything they ask for.

A pickle is a program: it names functions and classes, and has them called. Here a function that is not on the list of
`TorchUnpickler` is refused, and a class that is not becomes an inert `Placeholder` that only holds its state. So a
pickled network gives its tensors although its code is nowhere.
"""

import io
import pickle
import pickletools
from typing import Any, NamedTuple

from cskd_jax.errors import UserError

# A pickle may have so many operations, make so many tuples, and have so many elements and letters copied by what it
# calls and names. These bound the memory: no other operation makes more than a little or what the file has bytes for.
# The second also bounds the stack, because the hash of a tuple recurses into the tuples that it holds. ResNet152 has
# 79,000 operations and, with Adam's state, 8,100 tuples.
_MAX_OPERATIONS = 5_000_000
_MAX_TUPLES = 30_000
_MAX_COPIED = 300_000
# Called by harmless files, with a result that nothing here reads: a Placeholder stands for it.
_INERT_CALLS = (
    "torch.device",
    "torch.nn.backends.thnn._get_thnn_function_backend",  # in every module before 1.2
    "functools.partial",
    "_codecs.encode",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)


# Tuples, because a pickle can change whatever has attributes or a state, but no tuple.


class Storage(NamedTuple):
    """Where the values of tensors lie.

    Attributes:
      key: of the storage in the file.
      kind: PyTorch's name of its type, such as "FloatStorage".
      size: number of values.
      start: of a view into a storage, in values; its size is still that of the whole.
    """

    key: str
    kind: str
    size: int
    start: int = 0


class Tensor(NamedTuple):
    """A tensor whose values are not read yet; offset and strides in values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _PlaceholderType(type):
    def __call__(cls, *_, **__):
        if cls.__name__ not in _INERT_CALLS:
            raise UserError(f"asks to call {shown(cls.__name__)}, which is not allowed")
        return cls.__new__(cls)


class Placeholder(metaclass=_PlaceholderType):
    """An instance of a class that the file names: takes every state, and does nothing."""

    def __new__(cls, *_, **__):
        return object.__new__(cls)

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__ = state  # not copied: a file can give one state to many

    def __setitem__(self, *_):
        pass

    def extend(self, _):
        pass


class _Dictionary(dict):
    """An OrderedDict without its attributes, such as the versions in a state dict, which nothing here reads."""

    def __setstate__(self, _):
        pass


class TorchUnpickler(pickle.Unpickler):
    """Reads one pickle from a stream; `storages` are those it named, by key."""

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
        """What stands for a function or class that the file names; nothing is imported."""
        full = f"{module}.{name}"
        if module in ("torch", "torch.cuda") and name.endswith("Storage"):
            return name
        if full in self._allowed:
            return self._allowed[full]
        if full not in self._placeholders:
            self._placeholders[full] = _PlaceholderType(self._counted(full), (Placeholder,), {})
        return self._placeholders[full]

    def persistent_load(self, pid: Any) -> Any:
        """What lies outside of the pickle: a storage, or a class whose source code the file holds besides."""
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

    # Methods, because a pickle can set attributes of what it gets, but none of a method.

    def _counted(self, values):
        """What is about to be copied; UserError if that is too much in all."""
        self._copied += len(values)
        if self._copied > _MAX_COPIED:
            raise UserError("is built to use memory beyond measure")
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
            raise UserError("holds a tensor whose sizes are no sizes")
        return Tensor(storage, storage.start + offset, shape, strides)

    def _parameter(self, tensor, *_):
        return tensor


def load(stream: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """Reads the pickle at the position of a stream, and leaves the position behind it.

    Returns:
      (content, storages by key). Content is made of dicts, lists, tuples, sets, texts, numbers, `Tensor`, `Storage`
      and `Placeholder`.

    Raises:
      UserError: it asks for a call that is not allowed, is damaged, or is beyond all measure.
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
    """A text out of a file as it may stand in a message: short, and printable."""
    return (text if text.isprintable() else ascii(text))[:200]


def _check_operations(stream):
    """Raises UserError for a pickle that would take memory or stack beyond measure, ValueError for a damaged one."""
    tuples = 0
    for number, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        tuples += operation.name.startswith("TUPLE")
        # The unpickler makes room for all the numbers below that of an object to remember.
        far = operation.name.endswith("PUT") and argument > number
        if far or tuples > _MAX_TUPLES or number > _MAX_OPERATIONS:
            raise UserError("is built to use memory beyond measure")
