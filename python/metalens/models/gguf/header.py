"""Read the header of a GGUF file: its metadata and its list of tensors.

The header is read here and not with the `gguf` package, because a wrong length in a damaged file must end with an error: each length is compared
with the bytes that are left before it is used.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from metalens.utils.errors import InvalidValueError, MissingPackageError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4
MOST_NESTED_ARRAYS = 4

# {number of a metadata type: its code for `struct`}. Strings and arrays have no code.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

T = TypeVar("T")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file.

    Attributes:
        name: the name in the file, for example 'blk.0.attn_q.weight'.
        kind: the name of its number format, for example 'Q4_0'.
        shape: [rows, columns], or [n] for a vector.
        data: the bytes as they are in the file [rows, bytes of a row], memory-mapped.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    data: np.ndarray


class Metadata(dict[str, Any]):
    """The metadata of a GGUF file by key. `setting` finds the keys of the file's own architecture."""

    path: Path

    @property
    def architecture(self) -> str:
        """Return the name of the architecture."""
        return str(self.need("general.architecture", str))

    def need(self, key: str, kind: type[T]) -> T:
        """Return the value of a key.

        Raises:
            InvalidValueError: if the file does not have it, or if it has another type.
        """
        if key not in self:
            raise InvalidValueError(f"{self.path} does not say {key!r}, which a conversion needs. Convert the original model to GGUF again.")
        value = self[key]
        if kind is float and isinstance(value, (int, float)):
            value = float(str(np.float32(value)))  # the shortest number that is the same in float32, as 1e-06
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InvalidValueError(f"{self.path}: {key} must be of type {kind.__name__}, got {value!r:.80}. The file may be damaged.")
        return value

    def setting(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return the value of '<architecture>.<key>', or the default if the file does not have it."""
        full = f"{self.architecture}.{key}"
        return default if default is not None and full not in self else self.need(full, kind)


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file.

    Attributes:
        path: the file.
        metadata: values by key.
        tensors: tensors by name.
    """

    path: Path
    metadata: Metadata
    tensors: dict[str, Tensor]


def is_gguf(path: str | Path) -> bool:
    """Return whether a path names an existing GGUF file: its first four bytes are 'GGUF', or its name ends in .gguf."""
    path = Path(path)
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return path.suffix.lower() == ".gguf" or file.read(4) == MAGIC
    except (OSError, ValueError):
        return False


def read_gguf(path: str | Path) -> GGUFFile:
    """Read the header of a GGUF file. Its tensors are mapped into memory, not read.

    Raises:
        OSError: if there is no such file, or if it can't be read.
        InvalidValueError: if it is damaged, or if metalens can't read its version.
        MissingPackageError: if the `gguf` package is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.stat().st_size < 24:
        raise InvalidValueError(f"{path} is damaged: it has {path.stat().st_size} bytes and no header. Download it again.")
    content = np.memmap(path, np.uint8, "r")
    cursor = _Cursor(content)
    try:
        return _parsed(path, cursor)
    except _DamageError as error:
        raise InvalidValueError(f"{path} is damaged: {error}. Download it again.") from error


def block_sizes() -> dict[int, tuple[str, int, int]]:
    """Return {number of a weight format: (its name, numbers in a block, bytes of a block)}.

    Raises:
        MissingPackageError: if the `gguf` package is not installed.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise MissingPackageError("Reading GGUF files needs the package gguf. Install it: pip install 'gguf>=0.19'") from error
    return {int(kind): (kind.name, *size) for kind, size in GGML_QUANT_SIZES.items()}


class _DamageError(Exception):
    """The header contradicts itself or the length of the file."""


class _Cursor:
    """A position in the bytes of a file that never leaves them."""

    def __init__(self, content: np.ndarray) -> None:
        self.content = content
        self.position = 0

    def take(self, count: int) -> bytes:
        if count > self.content.size - self.position:
            raise _DamageError(f"its header wants {count} bytes at {self.position}, and the file ends at {self.content.size}")
        taken = self.content[self.position : self.position + count].tobytes()
        self.position += count
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _DamageError(f"a string before byte {self.position} is not UTF-8") from error

    def value(self, kind: int, nesting: int = 0) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY or nesting == MOST_NESTED_ARRAYS:
            raise _DamageError(f"there is no metadata type {kind} (byte {self.position})")
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            code = f"<{count}{SCALARS[inner]}"
            return list(struct.unpack(code, self.take(count * struct.calcsize(f"<{SCALARS[inner]}"))))
        if 8 * count > self.content.size - self.position:  # a string and an array begin with 8 bytes or more
            raise _DamageError(f"an array of {count} items begins at byte {self.position}, and the file ends at {self.content.size}")
        return [self.value(inner, nesting + 1) for _ in range(count)]


def _parsed(path: Path, cursor: _Cursor) -> GGUFFile:
    if cursor.take(4) != MAGIC:
        raise InvalidValueError(f"{path} is no GGUF file: it does not begin with the bytes 'GGUF'.")
    version = cursor.number("I")
    if version not in VERSIONS:
        reason = "it is for big-endian machines" if version & 0xFFFF == 0 else f"metalens reads versions {VERSIONS[0]} and {VERSIONS[1]}"
        raise InvalidValueError(f"{path} has GGUF version {version}: {reason}. Convert the original model to GGUF again.")
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    metadata = Metadata()
    metadata.path = path
    for _ in range(value_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    if int(metadata.get("split.count", 0)) > 1:
        raise InvalidValueError(f"{path} is one of {metadata['split.count']} parts. Join them first: llama-gguf-split --merge FIRST_PART WHOLE.")
    described = [_described(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _DamageError(f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: _mapped(cursor.content, name, shape, kind, start + offset) for name, shape, kind, offset in described}
    if len(tensors) != tensor_count:
        raise _DamageError("two tensors have one name")
    return GGUFFile(path, metadata, tensors)


def _described(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Return the name of a tensor, its shape with the rows first, the number of its format and its offset."""
    name, count = cursor.string(), cursor.number("I")
    if not 1 <= count <= MOST_DIMENSIONS:
        raise _DamageError(f"tensor {name} has {count} dimensions")
    return name, tuple(cursor.number("Q") for _ in range(count))[::-1], cursor.number("I"), cursor.number("Q")


def _mapped(content: np.ndarray, name: str, shape: tuple[int, ...], kind: int, start: int) -> Tensor:
    known = block_sizes()
    if kind not in known:
        raise InvalidValueError(f"Tensor {name} has the weight format number {kind}, which the gguf package does not know. Try: pip install -U gguf")
    label, numbers, size = known[kind]
    if shape[-1] % numbers or math.prod(shape) == 0:
        raise _DamageError(f"tensor {name} has the shape {list(shape)}, and {label} needs rows of a multiple of {numbers}")
    row_bytes, rows = shape[-1] // numbers * size, math.prod(shape[:-1])
    end = start + rows * row_bytes
    if end > content.size:
        raise _DamageError(f"tensor {name} ends at byte {end}, and the file at {content.size}")
    return Tensor(name, label, shape, content[start:end].reshape(rows, row_bytes))
