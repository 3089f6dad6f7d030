"""Reads pickles as PyTorch writes them, without executing anything that they ask for.

A pickle is a program for a stack machine, which names functions and classes and has them called. Python's own machine
hashes whatever a file says, as often as it says, so a short file can keep it busy for years. The machine here makes
only what is needed to read a state dict or a network: dictionaries of strings, lists, tuples, and descriptions of
tensors. It hashes nothing but short strings, and counts what it makes. A function that it does not know is refused, and
an object of any class becomes an inert `Placeholder` that only holds its state. The tensors of a pickled network can
thus be read even though its code is not available.
"""

import pickle
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from cskd_jax.errors import UserError
from cskd_jax.interop.torch_objects import (
    MAX_NAME,
    Calls,
    Global,
    Placeholder,
    Storage,
    is_name,
    set_items,
    shown,
    too_much,
)

# Limits on the operations of a pickle, on the containers and objects that it makes, and on the bytes of its strings.
# Together with the limits of `Calls`, they bound time and memory, since the cost of an operation is bounded by what it
# reads or copies. ResNet152 with Adam's state has 150,000 operations and 20,000 containers.
_MAX_OPERATIONS = 1_000_000
_MAX_CONTAINERS = 150_000
_MAX_TEXT = 16 << 20
# No known function takes this many arguments. They are copied when it is called.
_MAX_ARGUMENTS = 20
# The longest integer of PyTorch's files, which marks the older format, has 10 bytes.
_MAX_INTEGER = 128


class _Mark:
    """A mark on the stack where the operands of an operation begin."""


_MARK = _Mark()


class TorchUnpickler:
    """A reader of one pickle from a stream, which is left positioned after the pickle.

    Args:
      stream: Stream of bytes.

    Attributes:
      storages: Storages that the pickle names, by key.
    """

    def __init__(self, stream: BinaryIO):
        self.storages: dict[str, Storage] = {}
        self._stream, self._stack, self._memo = stream, [], []
        self._globals: dict[tuple[str, str], Global] = {}
        self._calls = Calls()
        self._operations = self._containers = self._text_bytes = 0

    def load(self) -> Any:
        """Returns the content of the pickle.

        Raises:
          UserError: The pickle asks for a call that is not allowed, or exceeds a limit.
          Exception: The pickle is damaged; many types of errors are possible.
        """
        read, stop = self._stream.read, pickle.STOP
        while (code := read(1)) != stop:
            self._operations += 1
            if self._operations > _MAX_OPERATIONS:
                raise too_much()
            operation = _OPERATIONS.get(code)
            if operation is None:
                raise ValueError(f"unknown operation {code!r}" if code else "it is truncated")
            operation(self)
        return self._pop()

    # The stack, and what is read from the stream.

    def _push(self, value):
        self._stack.append(value)

    def _push_new(self, value):
        """Pushes a new container or object onto the stack."""
        self._containers += 1
        if self._containers > _MAX_CONTAINERS:
            raise too_much()
        self._stack.append(value)

    def _pop(self):
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("an operand is missing")
        return value

    def _pop_mark(self):
        """Removes the topmost mark and the values above it, and returns the values."""
        stack, position = self._stack, len(self._stack) - 1
        while position >= 0 and stack[position] is not _MARK:
            position -= 1
        if position < 0:
            raise ValueError("a mark is missing")
        values = stack[position + 1 :]
        del stack[position:]
        return values

    def _bytes(self, count):
        data = self._stream.read(count) if count <= _MAX_TEXT else b""
        if len(data) != count:
            raise ValueError("it is truncated")
        return data

    def _number(self, form):
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _line(self):
        line = self._stream.readline(_MAX_TEXT)
        if not line.endswith(b"\n"):
            raise ValueError("a line does not end")
        return self._text(line[:-1])

    def _text(self, data):
        self._text_bytes += len(data)
        if self._text_bytes > _MAX_TEXT:
            raise too_much()
        return data.decode("utf-8", errors="replace")

    def _skip(self, count):
        """Reads bytes that are not needed here, such as those of a NumPy array, without keeping them."""
        while count > 0:
            data = self._stream.read(min(count, _MAX_TEXT))
            if not data:
                raise ValueError("it is truncated")
            count -= len(data)
        self._push(b"")

    # Numbers, texts, containers, and the memory of the machine.

    def _integer(self, count):
        if count > _MAX_INTEGER:
            raise UserError(f"holds a number of {count} bytes; at most {_MAX_INTEGER} are allowed")
        self._push(int.from_bytes(self._bytes(count), "little", signed=True))

    def _integer_line(self):
        text = self._line()
        if text in ("00", "01"):  # This is how the oldest protocol writes False and True.
            self._push(text == "01")
        elif len(text) > _MAX_INTEGER:
            raise UserError(f"holds a number of {len(text)} digits; at most {_MAX_INTEGER} are allowed")
        else:
            self._push(int(text.removesuffix("L")))

    def _quoted_line(self):
        text = self._line()
        if len(text) < 2 or text[0] != text[-1] or text[0] not in "\"'":
            raise ValueError("a string has no quotation marks")
        self._push(text[1:-1])

    def _tuple(self, count):
        values = tuple(self._pop() for _ in range(count))
        self._push_new(values[::-1])

    def _dictionary(self):
        values, found = self._pop_mark(), {}
        set_items(found, values)
        self._push_new(found)

    def _one(self, add):
        """Adds the topmost value to the container below it."""
        value = self._pop()
        add(self._top(), [value])

    def _pair(self):
        value, key = self._pop(), self._pop()
        set_items(self._top(), [key, value])

    def _many(self, add):
        """Adds the values above the topmost mark to the container below it."""
        values = self._pop_mark()
        add(self._top(), values)

    def _put(self, index):
        # A pickle numbers the objects that it remembers consecutively; a much larger number would only take memory.
        if index > self._operations:
            raise too_much()
        self._memo.extend([_MARK] * (index + 1 - len(self._memo)))
        self._memo[index] = self._top()

    def _get(self, index):
        value = self._memo[index] if 0 <= index < len(self._memo) else _MARK
        if value is _MARK:
            raise ValueError(f"unknown object {index}")
        self._push(value)

    def _top(self):
        value = self._stack[-1]
        if value is _MARK:
            raise ValueError("an operand is missing")
        return value

    def _protocol(self):
        version = self._number("B")
        if version > pickle.HIGHEST_PROTOCOL:
            raise ValueError(f"unknown protocol {version}")

    # Functions, classes, and objects.

    def _global(self, module, name):
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > MAX_NAME:
            raise ValueError("a function or class has no name, or one that is too long")
        if (module, name) not in self._globals:
            self._calls.count(len(module) + len(name))
            self._globals[module, name] = Global(f"{module}.{name}")
        self._push(self._globals[module, name])

    def _stack_global(self):
        name, module = self._pop(), self._pop()
        self._global(module, name)

    def _new_object(self, operands):
        """Makes an object of a class from its class and arguments, without calling anything."""
        kind = [self._pop() for _ in range(operands)][-1]
        if not isinstance(kind, Global):
            raise ValueError("an object has no class")
        self._push_new({} if kind.name == "collections.OrderedDict" else Placeholder())

    def _instance(self):
        self._global(self._line(), self._line())
        kind = self._pop()
        self._call(kind, self._pop_mark())

    def _instance_of(self):
        kind, *arguments = self._pop_mark()
        self._call(kind, arguments)

    def _reduce(self):
        arguments, function = self._pop(), self._pop()
        self._call(function, arguments)

    def _call(self, function, arguments):
        if not isinstance(function, Global) or not isinstance(arguments, tuple | list):
            raise ValueError("something other than a function is called")
        if len(arguments) > _MAX_ARGUMENTS:
            raise ValueError(f"a call has {len(arguments)} arguments")
        self._push_new(self._calls.call(function.name, arguments))

    def _build(self):
        state, target = self._pop(), self._top()
        if isinstance(target, Placeholder):
            if isinstance(state, dict):
                target.state = state  # Not a copy: many objects can share one state.
        elif not isinstance(target, dict):  # The attributes of an OrderedDict, such as versions, are not read.
            inner = state[-1] if isinstance(state, tuple) and state else state
            names = ", ".join(list(inner)[:3]) if isinstance(inner, dict) else type(inner).__name__
            raise ValueError(f"{type(target).__name__} takes no state, such as {names}")

    def _persistent(self, pid: Any):
        """Pushes an object stored outside of the pickle: a storage, or a class whose source code is in the file too."""
        if type(pid) is not tuple or len(pid) < 2:
            raise UserError("holds something other than storages outside of its pickle")
        if pid[0] == "module":
            return self._push(pid[1])
        _, kind, key, _, size, *view = pid
        start = view[0][1] if view and view[0] is not None else 0
        name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else kind
        wanted = (key, str), (name, str), (size, int), (start, int)
        if pid[0] != "storage" or any(type(value) is not of for value, of in wanted) or len(key) > MAX_NAME:
            raise UserError("holds something other than storages outside of its pickle")
        self.storages[key] = Storage(key, name, size, start)
        return self._push_new(self.storages[key])


def _append(target, values):
    if isinstance(target, list):
        target.extend(values)
    elif not isinstance(target, Placeholder):
        raise ValueError(f"{type(target).__name__} takes no elements")


def _add(target, values):
    if not isinstance(target, set):
        raise ValueError(f"{type(target).__name__} is not a set")
    target.update(filter(is_name, values))


# Every operation that is read, and what it does. Operations for extensions and for buffers outside of the file are not.
_OPERATIONS: dict[bytes, Callable[[TorchUnpickler], Any]] = {
    pickle.PROTO: TorchUnpickler._protocol,
    pickle.FRAME: lambda m: m._bytes(8),
    pickle.MARK: lambda m: m._push(_MARK),
    pickle.POP: lambda m: m._stack.pop(),
    pickle.POP_MARK: TorchUnpickler._pop_mark,
    pickle.DUP: lambda m: m._push(m._top()),
    pickle.NONE: lambda m: m._push(None),
    pickle.NEWTRUE: lambda m: m._push(True),
    pickle.NEWFALSE: lambda m: m._push(False),
    pickle.INT: TorchUnpickler._integer_line,
    pickle.LONG: TorchUnpickler._integer_line,
    pickle.BININT: lambda m: m._push(m._number("<i")),
    pickle.BININT1: lambda m: m._push(m._number("B")),
    pickle.BININT2: lambda m: m._push(m._number("<H")),
    pickle.LONG1: lambda m: m._integer(m._number("B")),
    pickle.LONG4: lambda m: m._integer(m._number("<I")),
    pickle.FLOAT: lambda m: m._push(float(m._line()[:_MAX_INTEGER])),
    pickle.BINFLOAT: lambda m: m._push(m._number(">d")),
    pickle.STRING: TorchUnpickler._quoted_line,
    pickle.BINSTRING: lambda m: m._push(m._text(m._bytes(m._number("<I")))),
    pickle.SHORT_BINSTRING: lambda m: m._push(m._text(m._bytes(m._number("B")))),
    pickle.UNICODE: lambda m: m._push(m._line()),
    pickle.SHORT_BINUNICODE: lambda m: m._push(m._text(m._bytes(m._number("B")))),
    pickle.BINUNICODE: lambda m: m._push(m._text(m._bytes(m._number("<I")))),
    pickle.BINUNICODE8: lambda m: m._push(m._text(m._bytes(m._number("<Q")))),
    pickle.SHORT_BINBYTES: lambda m: m._skip(m._number("B")),
    pickle.BINBYTES: lambda m: m._skip(m._number("<I")),
    pickle.BINBYTES8: lambda m: m._skip(m._number("<Q")),
    pickle.BYTEARRAY8: lambda m: m._skip(m._number("<Q")),
    pickle.EMPTY_TUPLE: lambda m: m._tuple(0),
    pickle.TUPLE1: lambda m: m._tuple(1),
    pickle.TUPLE2: lambda m: m._tuple(2),
    pickle.TUPLE3: lambda m: m._tuple(3),
    pickle.TUPLE: lambda m: m._push_new(tuple(m._pop_mark())),
    pickle.EMPTY_LIST: lambda m: m._push_new([]),
    pickle.LIST: lambda m: m._push_new(m._pop_mark()),
    pickle.APPEND: lambda m: m._one(_append),
    pickle.APPENDS: lambda m: m._many(_append),
    pickle.EMPTY_DICT: lambda m: m._push_new({}),
    pickle.DICT: TorchUnpickler._dictionary,
    pickle.SETITEM: TorchUnpickler._pair,
    pickle.SETITEMS: lambda m: m._many(set_items),
    pickle.EMPTY_SET: lambda m: m._push_new(set()),
    pickle.ADDITEMS: lambda m: m._many(_add),
    pickle.FROZENSET: lambda m: m._push_new(set(filter(is_name, m._pop_mark()))),
    pickle.PUT: lambda m: m._put(int(m._line()[:20])),
    pickle.BINPUT: lambda m: m._put(m._number("B")),
    pickle.LONG_BINPUT: lambda m: m._put(m._number("<I")),
    pickle.MEMOIZE: lambda m: m._put(len(m._memo)),
    pickle.GET: lambda m: m._get(int(m._line()[:20])),
    pickle.BINGET: lambda m: m._get(m._number("B")),
    pickle.LONG_BINGET: lambda m: m._get(m._number("<I")),
    pickle.GLOBAL: lambda m: m._global(m._line(), m._line()),
    pickle.STACK_GLOBAL: TorchUnpickler._stack_global,
    pickle.INST: TorchUnpickler._instance,
    pickle.OBJ: TorchUnpickler._instance_of,
    pickle.NEWOBJ: lambda m: m._new_object(2),
    pickle.NEWOBJ_EX: lambda m: m._new_object(3),
    pickle.REDUCE: TorchUnpickler._reduce,
    pickle.BUILD: TorchUnpickler._build,
    pickle.BINPERSID: lambda m: m._persistent(m._pop()),
    pickle.PERSID: lambda m: m._persistent(m._line()),
}


def load(stream: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """Reads the pickle at the current position of a stream, and leaves the stream positioned after it.

    Returns:
      The content and the storages by key. The content is made of dicts and sets of names, lists, tuples, strings,
      numbers, `Tensor`, `Storage`, `Global` and `Placeholder`.

    Raises:
      UserError: If the pickle asks for a call that is not allowed, is damaged, or exceeds a limit.
    """
    machine = TorchUnpickler(stream)
    try:
        return machine.load(), machine.storages
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:  # What a damaged pickle does to the stack raises many types of errors.
        raise UserError(f"holds no valid pickle ({type(error).__name__}: {shown(str(error))})") from None
