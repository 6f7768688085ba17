"""Read pickles of tensors without the pickle module, so that a file can call nothing.

`torch.save` writes a pickle that builds its tensors by calling functions by name. Python's unpickler imports modules,
calls functions and sets attributes because a file says so, even with restrictions. `read` is an interpreter for the two
dozen opcodes that files of tensors need. Its only values are numbers, strings, tuples, lists, dicts, and the classes
below. It looks a name up in a table of its own, which maps the name to an enum member and never to the object of that
name.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from enum import Enum
from typing import IO, Any


class Name(Enum):
    """The two callables that a file of tensors names. They are never called."""

    ORDERED_DICT = "collections OrderedDict"
    REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"


class Element(Enum):
    """Number formats, by torch's name of their storage."""

    FLOAT32 = "torch FloatStorage"
    FLOAT16 = "torch HalfStorage"
    BFLOAT16 = "torch BFloat16Storage"
    FLOAT64 = "torch DoubleStorage"

    @property
    def itemsize(self) -> int:
        """Return the bytes of one number."""
        return {Element.FLOAT32: 4, Element.FLOAT64: 8}.get(self, 2)


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file.

    Attributes:
        element: format of the numbers.
        key: name of the storage in the file.
        size: number of numbers.
    """

    element: Element
    key: str
    size: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage: element (i, j) is number offset + i * strides[0] + j * strides[1] of it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Opaque(Enum):
    """What a file builds besides tensors, where that may be anything: the file names a function or class, and nothing is looked up or called."""

    OPAQUE = "opaque"


OPAQUE = Opaque.OPAQUE
NAMES: dict[str, Name | Element] = {name.value: name for name in (*Name, *Element)}
CONSTANTS = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read(stream: IO[bytes], *, opaque: bool = False) -> Any:
    """Return the object that one pickle of protocol 2 builds. Leave the stream at the end of the pickle.

    Args:
        stream: bytes in memory. Their number bounds the memory that the pickle can ask for.
        opaque: read over objects of other kinds, which become OPAQUE. False = they are errors.

    Returns:
        numbers, strings, tuples, lists, dicts (also for OrderedDict), `Tensor` and `Storage`.

    Raises:
        ValueError: if the pickle is damaged, or has an opcode that files of tensors do not need; the message names the
            opcode and its position.
    """
    machine = _Machine(opaque)
    for opcode, argument, position in pickletools.genops(stream):
        try:
            machine.step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{opcode.name} at byte {position} of its pickle: {error if isinstance(error, ValueError) else 'damaged'}") from error
    return machine.result


class _Machine:
    def __init__(self, opaque: bool) -> None:
        self.opaque = opaque
        self.stack: list[Any] = []
        self.marks: list[int] = []  # height of the stack at each MARK
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, opcode: str, argument: Any) -> None:  # noqa: PLR0912  one branch per opcode
        stack = self.stack
        match opcode:
            case "PROTO":
                if argument != 2:
                    raise ValueError(f"it has protocol {argument}; torch.save writes 2")
            case "MARK":
                self.marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "TUPLE":
                stack.append(tuple(self.above_mark()))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "APPEND" | "APPENDS":
                values = self.above_mark() if opcode == "APPENDS" else [stack.pop()]
                if not self.is_opaque():
                    self.top(list).extend(values)
            case "SETITEM" | "SETITEMS":
                self.set_items(self.above_mark() if opcode == "SETITEMS" else self.pop(2))
            case "GLOBAL":
                stack.append(self.named(argument))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                stack.append(_reduce(*self.pop(2)))
            case "NEWOBJ" if self.opaque:
                self.pop(2)
                stack.append(OPAQUE)
            case "BUILD":
                self.set_state(stack.pop())
            case "STOP":
                if len(stack) != 1 or self.marks:
                    raise IndexError
                self.result = stack[0]
            case _ if opcode in CONSTANTS:
                stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(opcode, argument))
            case _ if opcode in TUPLES:
                stack.append(tuple(self.pop(TUPLES[opcode])))
            case _:
                raise ValueError("no file of tensors needs this; nothing was loaded or run")

    def pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError
        cut = len(self.stack) - count
        values = self.stack[cut:]
        del self.stack[cut:]
        return values

    def above_mark(self) -> list[Any]:
        count = len(self.stack) - self.marks.pop()
        if count < 0:
            raise IndexError
        return self.pop(count)

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"it needs a {kind.__name__}")
        return self.stack[-1]

    def named(self, name: str) -> Any:
        """Return what a name stands for here."""
        if name not in NAMES and not self.opaque:
            raise ValueError(f"it names {name!r:.200}, which no file of tensors needs; nothing was loaded or run")
        return NAMES.get(name, OPAQUE)

    def set_state(self, state: Any) -> None:
        """Read over the state of an object: `_metadata` of a state dict, which has versions of layers, or anything of what is read over."""
        if self.is_opaque():
            return
        if not isinstance(state, dict):
            raise ValueError("it sets the state of an object")
        self.top(dict)

    def is_opaque(self) -> bool:
        """Return whether an object on top is one that is read over."""
        return self.stack[-1] is OPAQUE

    def set_items(self, values: list[Any]) -> None:
        if len(values) % 2:
            raise ValueError("a key without a value")
        if self.is_opaque():
            return
        target = self.top(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            if (type(key) is not str and not (self.opaque and type(key) is int)) or key in target:
                raise ValueError("keys must be different strings")
            target[key] = value


def _storage(identity: Any) -> Storage | Opaque:
    """Return the storage of a persistent id ('storage', type, key, device, size). In old files it has a sixth part, a view, which must be None."""
    if type(identity) is tuple and len(identity) in (5, 6) and identity[0] == "storage" and (len(identity) == 5 or identity[5] is None):
        _, element, key, _, size = identity[:5]
        if isinstance(element, Opaque):
            return element
        if type(element) is Element and type(key) is str and type(size) is int and size >= 0:
            return Storage(element, key, size)
    raise ValueError("no storage of float32, float16, bfloat16 or float64 numbers")


def _reduce(function: Any, arguments: Any) -> Any:
    if function is OPAQUE or (type(arguments) is tuple and arguments[:1] == (OPAQUE,)):
        return OPAQUE
    if function is Name.ORDERED_DICT and arguments == ():
        return {}
    if function is not Name.REBUILD_TENSOR or type(arguments) is not tuple or len(arguments) != 6:
        raise ValueError("it calls what is not a tensor's constructor; nothing was run")
    storage, offset, shape, strides, _, _ = arguments
    numbers = (offset, *shape, *strides) if type(shape) is tuple and type(strides) is tuple and len(shape) == len(strides) else (None,)
    if type(storage) is not Storage or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor whose offset, shape or strides are no such")
    return Tensor(storage, offset, shape, strides)
