"""Read and write files of torch tensors without torch.

Reads the zip archive that torch.save has written since version 1.6 (data.pkl, data/<key>, byteorder, version), and the
older stream of pickles and bytes. Writes the zip archive, which `torch.load(weights_only=True)` reads. A file is not
trusted: every size that it claims is compared with its number of bytes before memory is allocated.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np

from metalens.lenses.pickled import Element, Storage, Tensor, read
from metalens.utils.errors import InvalidValueError

# The largest pickle that is read, in bytes. A tensor takes about 150.
PICKLE_LIMIT = 1 << 20
# The same of a snapshot of a training, which also holds the state of the data.
SNAPSHOT_PICKLE_LIMIT = 1 << 26
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# {name of a dtype: (torch's storage, MLX's dtype)}
WRITABLE = {"float32": (Element.FLOAT32, mx.float32), "float16": (Element.FLOAT16, mx.float16), "bfloat16": (Element.BFLOAT16, mx.bfloat16)}


@dataclass(frozen=True)
class _Contents:
    """The contents that a file claims.

    Attributes:
        state: object that its pickle builds.
        little_endian: byte order of its numbers.
        read: a function that reads the bytes of a storage.
    """

    state: Any
    little_endian: bool
    read: Callable[[Storage], bytes]


def read_tensors(file: Path, expected: Callable[[int], Mapping[str, tuple[int, ...]]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a state dict, one at a time, as float32. Nothing in the file is run.

    Args:
        file: a file that torch.save wrote.
        expected: a function from the number of tensors in the file to {name: shape} of the required tensors. More or
            fewer tensors are an error.

    Yields:
        (name, array), in the order of the file's storages.

    Raises:
        InvalidValueError: if the file is not such a file, or holds NaN or infinity.
        OSError: if the file cannot be opened.
    """
    with file.open("rb") as stream, _named_errors(file, "a tuned lens file"):
        contents = _open_zip(stream) if stream.read(4) == b"PK\x03\x04" else _open_legacy(stream)
        state = _tensors_of(contents.state)
        yield from _tensors(contents, state, expected(len(state)))


class Snapshot:
    """A file that torch.save wrote of a dict: some of its entries are state dicts, others anything, which is read over. Nothing in it is run.

    Use it as a context manager.

    Args:
        file: the file, an archive as torch has written since version 1.6.
        what: what the file should be, for errors.

    Raises:
        InvalidValueError: if the file is no such archive.
        OSError: if the file cannot be opened.
    """

    def __init__(self, file: Path, what: str) -> None:
        self.file, self.what = file, what

    def __enter__(self) -> Snapshot:
        self._stack = contextlib.ExitStack()
        stream = self._stack.enter_context(self.file.open("rb"))
        with self._stack, self.errors():
            if stream.read(4) != b"PK\x03\x04":
                raise InvalidValueError("no archive of torch.save")
            self._contents = _open_zip(stream, SNAPSHOT_PICKLE_LIMIT, opaque=True)
            if not isinstance(self._contents.state, dict):
                raise InvalidValueError("it holds no dict")
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def errors(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager in which errors name the file."""
        return _named_errors(self.file, self.what)

    def __getitem__(self, name: str) -> Any:
        """Return an entry; None if there is none."""
        return self._contents.state.get(name)

    def tensors(self, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield tensors of an entry, as `read_tensors` does, after a check of their names and shapes."""
        with self.errors():
            yield from _tensors(self._contents, state, shapes)


@contextlib.contextmanager
def _named_errors(file: Path, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # zipfile alone raises a dozen types for damaged archives
        raise InvalidValueError(f"{file} is not {what}, or is damaged: {error}.") from error


def _tensors_of(state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not all(type(tensor) is Tensor for tensor in state.values()):
        raise InvalidValueError("it holds something other than named tensors")
    return state


def _tensors(contents: _Contents, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a state dict that must have these names and shapes."""
    if set(shapes) != set(state):
        names = sorted(set(shapes) ^ set(state))
        raise InvalidValueError(f"expected {len(shapes)} tensors, found {len(state)}; missing or unexpected: {', '.join(names[:4])}")
    by_storage: dict[Storage, list[str]] = {}
    for name, tensor in state.items():
        _check_view(name, tensor, shapes[name])
        by_storage.setdefault(tensor.storage, []).append(name)
    for storage, names in by_storage.items():
        data = contents.read(storage)
        for name in names:
            yield name, _array(name, state[name], data, contents.little_endian)


def _check_view(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Check that a tensor lies within its storage, has this shape and uses no number twice: a small file must not ask for any amount of memory."""
    if tensor.shape != shape:
        raise InvalidValueError(f"{name} has shape {tensor.shape}; its config.json says {shape}")
    needed = 1
    for stride, size in sorted(zip(tensor.strides, tensor.shape, strict=True)):
        if size > 1 and stride < needed:
            raise InvalidValueError(f"{name} has strides {tensor.strides}, with which its numbers overlap")
        needed += stride * (size - 1)
    if tensor.offset + needed > tensor.storage.size:
        raise InvalidValueError(f"{name} reaches beyond its storage of {tensor.storage.size} numbers")


def _array(name: str, tensor: Tensor, data: bytes, little_endian: bool) -> np.ndarray:
    order, element = "<" if little_endian else ">", tensor.storage.element
    code = {Element.FLOAT32: "f4", Element.FLOAT16: "f2", Element.BFLOAT16: "u2", Element.FLOAT64: "f8"}[element]
    numbers = np.frombuffer(data, order + code)[tensor.offset :]
    view = np.lib.stride_tricks.as_strided(numbers, tensor.shape, [stride * numbers.itemsize for stride in tensor.strides], writeable=False)
    if element is Element.BFLOAT16:
        array = (view.astype(np.uint32, order="C") << 16).view(np.float32)
    else:
        with np.errstate(over="ignore"):
            array = view.astype(np.float32, order="C")
    if not np.isfinite(array).all():
        raise InvalidValueError(f"{name} holds NaN or infinity")
    return array


# ------------------------------------------------------------------ the zip archive


def _open_zip(stream: IO[bytes], pickle_limit: int = PICKLE_LIMIT, *, opaque: bool = False) -> _Contents:
    archive = zipfile.ZipFile(stream)
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names):
        raise InvalidValueError("two records of its archive have the same name")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size for entry in entries):
        raise InvalidValueError("its archive is compressed or encrypted; torch.save's never are")
    if sum(entry.file_size for entry in entries) > stream.seek(0, io.SEEK_END):
        raise InvalidValueError("its records are larger than the file")
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise InvalidValueError("its archive has no <name>/data.pkl, or several")

    def record(name: str, limit: int) -> bytes:
        entry = archive.getinfo(roots[0] + name)
        if entry.file_size > limit:
            raise InvalidValueError(f"its {name} has {entry.file_size} bytes, more than {limit}")
        return archive.read(entry)

    order = record("byteorder", 16) if roots[0] + "byteorder" in names else b"little"
    if order not in (b"little", b"big") or not 1 <= int(record("version", 16)) <= 10:
        raise InvalidValueError("its archive has an unknown version or order of bytes")

    def read_storage(storage: Storage) -> bytes:
        data = record(f"data/{storage.key}", storage.size * storage.element.itemsize)
        if len(data) < storage.size * storage.element.itemsize:
            raise InvalidValueError(f"its data/{storage.key} has {len(data)} bytes, fewer than {storage.size} numbers need")
        return data

    return _Contents(read(io.BytesIO(record("data.pkl", pickle_limit)), opaque=opaque), order == b"little", read_storage)


def write_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]], arrays: Iterable[mx.array], dtype: str = "float32") -> None:
    """Write a state dict as torch.save does: an OrderedDict of contiguous tensors on the CPU.

    Args:
        file: path of the file; an old file is overwritten.
        shapes: {name: shape}, in the order of `arrays`.
        arrays: an array for each name. One at a time is in memory.
        dtype: number format of the tensors, a key of WRITABLE.

    Raises:
        InvalidValueError: if a number has no finite form in this dtype.
        OSError: if the file cannot be written.
    """
    element, kind = WRITABLE[dtype]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write_record(archive, "data.pkl", _state_pickle(shapes, element))
        _write_record(archive, "byteorder", b"little")
        for key, (name, array) in enumerate(zip(shapes, arrays, strict=True)):
            converted = array.astype(kind)
            if not mx.all(mx.isfinite(converted)).item():
                raise InvalidValueError(
                    f"{name} holds numbers that {dtype} has no form for: NaN, infinity, or a number beyond its range. Write it as float32."
                )
            _write_record(archive, f"data/{key}", np.array(mx.contiguous(converted).view(mx.uint8)).tobytes())
        _write_record(archive, "version", b"3\n")


def _write_record(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Write a record whose data start at a multiple of 64 bytes, as torch's do, so that they can be mapped into memory."""
    entry = zipfile.ZipInfo(f"params/{name}")
    assert archive.fp is not None
    start = archive.fp.tell() + 30 + len(entry.filename) + 4
    padding = -start % 64
    entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    archive.writestr(entry, data)


def _state_pickle(shapes: Mapping[str, tuple[int, ...]], element: Element) -> bytes:
    """Return the pickle, in protocol 2, of an OrderedDict of tensors whose storages are named 0, 1, ..."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def number(value: int) -> bytes:
        encoded = pickle.encode_long(value)
        return b"\x8a" + bytes([len(encoded)]) + encoded

    def numbers(values: Iterable[int]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    def named(value: str) -> bytes:
        return b"c" + value.replace(" ", "\n").encode() + b"\n"

    empty = named("collections OrderedDict") + b")R"
    out = [b"\x80\x02", empty, b"("]
    for key, (name, shape) in enumerate(shapes.items()):
        storage = b"(" + text("storage") + named(element.value) + text(str(key)) + text("cpu") + number(int(np.prod(shape))) + b"tQ"
        strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        tensor = storage + number(0) + numbers(shape) + numbers(strides) + b"\x89" + empty
        out += [text(name), named("torch._utils _rebuild_tensor_v2"), b"(", tensor, b"tR"]
    return b"".join([*out, b"u."])


# ------------------------------------------------------------------ the older format


def _open_legacy(stream: IO[bytes]) -> _Contents:
    """Open a file of five pickles (a magic number, the protocol, facts of the machine, the object, the storages' keys) and the storages' bytes.

    The bytes of each storage are its number of elements (8 bytes), then the elements.
    """
    stream.seek(0)
    head = io.BytesIO(stream.read(PICKLE_LIMIT))
    if read(head) != LEGACY_MAGIC or read(head) != LEGACY_PROTOCOL:
        raise InvalidValueError("neither an archive nor an older file of torch.save")
    machine, state, keys = read(head), read(head), read(head)
    if not isinstance(machine, dict) or type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) < len(keys):
        raise InvalidValueError("its pickles are not those of torch.save")
    little_endian = machine.get("little_endian") is not False
    storages = {tensor.storage.key: tensor.storage for tensor in state.values() if type(tensor) is Tensor} if isinstance(state, dict) else {}
    position, end, offsets = head.tell(), stream.seek(0, io.SEEK_END), {}
    for key in keys:
        if key not in storages:
            raise InvalidValueError(f"it has no tensor for its storage {key!r:.200}")
        offsets[key] = position + 8
        position += 8 + storages[key].size * storages[key].element.itemsize
    if position != end:
        raise InvalidValueError(f"it has {end} bytes, and its tensors take {position}")

    def read_storage(storage: Storage) -> bytes:
        stream.seek(offsets[storage.key] - 8)
        if int.from_bytes(stream.read(8), "little" if little_endian else "big", signed=True) != storage.size:
            raise InvalidValueError(f"its storage {storage.key!r:.200} has another size than its tensor says")
        return stream.read(storage.size * storage.element.itemsize)

    return _Contents(state, little_endian, read_storage)
