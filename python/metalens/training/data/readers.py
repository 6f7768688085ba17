"""Readers of files, document by document: never a whole corpus in memory."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import importlib
import json
import os
import re
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from metalens.training.data.conversations import CHAT_FIELDS, PAIR, Conversation, conversation_of, plain_text
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import sha256_of

# Characters of a long text that are read and tokenized at once.
BLOCK = 1 << 20

# Bytes of a line of JSON Lines. A line is parsed as a whole, which takes several times its size.
LONGEST_LINE = 1 << 26

# Places to cut a text. A single line break between two words comes first: usual pre-tokenizers see the same on both sides. Else the ends of words.
CUTS = [re.compile(r"(?<=\S)\n(?=\S)"), re.compile(r"\n"), re.compile(r"(?<=\S)(?= )")]

# A file that changed less than this many ns ago may change again within the clock tick of its time stamp: its hash is not remembered.
SETTLED = 2_000_000_000

Identity = dict[str, Any]


class Piece(NamedTuple):
    """A document, or a part of a long document.

    Attributes:
        text: the text, which can be encoded as UTF-8.
        starts: whether a new document starts here.
        chat: a conversation; `text` is empty until the tokenizer's template makes it. None = plain text.
        where: place of the document, for errors.
        answers: characters of `text` that are of the model's answers, [(start, end), ...], ascending. None = nobody asked for them.
    """

    text: str
    starts: bool
    chat: Conversation | None = None
    where: str = ""
    answers: list[tuple[int, int]] | None = None


class Memory(Protocol):
    """Small facts that are kept between runs, such as the hash of an unchanged file."""

    def recall(self, name: str) -> Any:
        """Return the value under a name, or None."""

    def remember(self, name: str, value: Any) -> None:
        """Keep a JSON value under a name."""


class Source(ABC):
    """A text that can be read more than once, in the same order."""

    name: str

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """Yield the documents, long ones in parts.

        Raises:
            InvalidValueError: names the place, the fault and the remedy.
        """

    @abstractmethod
    def identity(self, memory: Memory | None = None) -> Identity:
        """Return flat JSON that changes when the text changes, but not when a file is moved."""

    def require_unchanged(self) -> None:  # noqa: B027 - what has a fixed revision cannot change
        """Check that the text is still the one that `identity` described (InvalidValueError)."""


def parts(text: str) -> Iterator[Piece]:
    """Yield a document, a long one in parts of about BLOCK characters: tokenizers take hundreds of bytes for every character of a part.

    Usual pre-tokenizers see the same on both sides of a cut, so the ids are those of the whole.
    """
    start = 0
    while len(text) - start > BLOCK:
        end = start + cut(text[start : start + BLOCK])
        yield Piece(text[start:end], starts=start == 0)
        start = end
    yield Piece(text[start:], starts=start == 0)


def pieces_of(record: Any, field: str, where: str) -> Iterator[Piece]:
    """Yield the document in a field of a record: a text, long ones in parts, or a conversation.

    A field of CHAT_FIELDS may hold messages. A record with "prompt" and "completion" in its place is a conversation of these two.

    Raises:
        InvalidValueError: if there is neither; names the fields that the record has.
    """
    chat = conversation_of(record, field, where)
    if chat is not None:
        yield Piece("", starts=True, chat=chat, where=where)
        return
    for part in parts(text_of(record, field, where)):
        yield part._replace(where=where)


def text_of(record: Any, field: str, where: str) -> str:
    """Return the text in a field of a record. If there is none, InvalidValueError names the fields that the record has."""
    if not isinstance(record, dict):
        raise InvalidValueError(f'{where}: expected one JSON object per line, like {{"{field}": "..."}}, got {type(record).__name__}.')
    if field not in record:
        raise InvalidValueError(
            f"{where}: there is no field {field!r}; there are {', '.join(map(repr, record)) or 'none'}. Name the one with the text."
        )
    if not isinstance(record[field], str):
        raise InvalidValueError(
            f"{where}: field {field!r} must be text, got {type(record[field]).__name__}. Name another field, or remove that document."
        )
    return plain_text(record[field], where)


class FileSource(Source):
    """A file, identified by the hash of its bytes.

    Args:
        path: path of an existing file.
    """

    kind = "file"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self._stamp: list[int] | None = None

    def stamp(self) -> list[int]:
        """Return numbers that change whenever the file is written. Unlike mtime, ctime can't be set back."""
        stat = os.stat(self.path)
        return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]

    def identity(self, memory: Memory | None = None) -> Identity:
        """Return the kind, size and SHA-256 of the file. A remembered hash saves reading it."""
        self._stamp = self.stamp()
        name = f"file {self.path.resolve()}"
        known = memory.recall(name) if memory is not None else None
        if isinstance(known, dict) and known.get("stamp") == self._stamp:
            return {"kind": self.kind, "bytes": self._stamp[0], "sha256": known["sha256"]}
        try:
            sha256 = sha256_of(self.path)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.require_unchanged()
        if memory is not None and time.time_ns() - max(self._stamp[1:3]) > SETTLED:
            memory.remember(name, {"stamp": self._stamp, "sha256": sha256})
        return {"kind": self.kind, "bytes": self._stamp[0], "sha256": sha256}

    def require_unchanged(self) -> None:
        """Check that the file has not changed since `identity`."""
        if self._stamp is not None and self.stamp() != self._stamp:
            raise InvalidValueError(f"{self.path} changed while it was read. Start again when no program writes to it any more.")

    def _open(self) -> IO[bytes]:
        return gzip.open(self.path) if self.path.suffix == ".gz" else self.path.open("rb")  # type: ignore[return-value]

    def _empty(self) -> ValueError:
        return InvalidValueError(f"{self.path} is empty. Give a file with text, or leave it out.")


class TextFile(FileSource):
    """A plain UTF-8 text: one document. Line breaks stay as they are; a byte order mark at the start is dropped."""

    kind = "text"

    def pieces(self) -> Iterator[Piece]:
        """Yield the text in parts of about BLOCK characters."""
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        rest, starts, lines, blank, ended = "", True, 1, True, False
        with self._open() as file:
            while not ended:
                block = read(file, self.path)
                ended = not block
                try:
                    rest += decoder.decode(block, final=ended)
                except UnicodeDecodeError as error:
                    line = lines + error.object[: error.start].count(b"\n")
                    raise InvalidValueError(f"{self.path}, line {line}: not UTF-8 ({error.reason}). Convert the file to UTF-8.") from error
                # The decoder may keep bytes of an unfinished character back: they hold no line break.
                lines += block.count(b"\n")
                end = len(rest) if ended else cut(rest)
                if "\0" in rest[:end]:
                    raise InvalidValueError(
                        f"{self.path}: it holds NUL characters, so it is a binary file, or UTF-16 without a byte order mark. Convert it to UTF-8."
                    )
                if end:
                    blank = blank and not rest[:end].strip()
                    yield Piece(rest[:end], starts, where=self.name)
                    rest, starts = rest[end:], False
        if blank:
            raise self._empty()


def read(file: IO[bytes], path: Path) -> bytes:
    """Read the next bytes. Errors are those of `_reading`."""
    with _reading(path):
        return file.read(BLOCK)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Let damaged compression (InvalidValueError) and what the system refuses (OSError) name the file."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InvalidValueError(f"{path} is damaged or cut off ({error}). Copy it again.") from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def cut(text: str) -> int:
    """Return the position at which to cut a text that goes on: the last one of the best kind of place that the text has."""
    for place in CUTS:
        end = max((found.end() for found in place.finditer(text)), default=0)
        if end:
            return end
    return len(text)


class FieldSource(FileSource):
    """A file of records, of which one field holds the text.

    Args:
        path: path of the file.
        field: name of the field.
    """

    def __init__(self, path: Path, field: str) -> None:
        super().__init__(path)
        self.field = field

    def identity(self, memory: Memory | None = None) -> Identity:
        """Return the identity of the file, and the field."""
        return super().identity(memory) | {"field": self.field}


class JsonLines(FieldSource):
    """A file with one JSON object per line; one field of each object is a document. Blank lines are skipped.

    Args:
        path: path of the file, which is read through gzip if its name ends in .gz.
        field: field with the text.
    """

    kind = "json-lines"

    def pieces(self) -> Iterator[Piece]:
        """Yield one document per line, long ones in parts."""
        for where, record in self.records():
            yield from pieces_of(record, self.field, where)

    def records(self) -> Iterator[tuple[str, Any]]:
        """Yield the JSON value of every line that is not blank, after its place ("tasks.jsonl, line 3") for errors.

        Raises:
            InvalidValueError: for a line that is not JSON, not UTF-8 or too long, and for a file without any line.
            OSError: if the file can't be read.
        """
        empty = True
        with self._open() as file:
            for number, line in enumerate(self._lines(file), 1):
                if not line.strip():
                    continue
                where, empty = f"{self.path}, line {number}", False
                if len(line) > LONGEST_LINE:
                    raise InvalidValueError(
                        f"{where}: longer than {LONGEST_LINE >> 20} MiB, the limit of a line. Divide that document, or give it as a text file."
                    )
                try:
                    record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    raise InvalidValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}). Convert the file to UTF-8.") from error
                except json.JSONDecodeError as error:
                    raise InvalidValueError(f"{where}: not JSON ({error.msg} at column {error.colno}). Each line must be one JSON object.") from error
                except (ValueError, RecursionError) as error:  # a number of too many digits, lists that are nested too deep
                    raise InvalidValueError(f"{where}: can't be read as JSON ({error}). Fix or remove that document.") from error
                yield where, record
        if empty:
            raise self._empty()

    def _lines(self, file: IO[bytes]) -> Iterator[bytes]:
        """Yield the lines; of one that is too long, only the start."""
        while True:
            with _reading(self.path):
                line = file.readline(LONGEST_LINE + 1)
            if not line:
                return
            yield line


class ParquetFile(FieldSource):
    """A column of a Parquet file, one document per row. Needs pyarrow.

    Args:
        path: path of the file.
        field: column with the text.
    """

    kind = "parquet"

    def pieces(self) -> Iterator[Piece]:
        """Yield one document per row, some rows in memory at a time."""
        try:
            parquet = importlib.import_module("pyarrow.parquet")
            arrow = importlib.import_module("pyarrow")
        except ImportError as error:
            raise InvalidValueError(f"Reading {self.path} needs pyarrow. Install it with: pip install 'metalens[data]'") from error
        row = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                columns = file.schema_arrow.names
                read = [self.field]
                if self.field in CHAT_FIELDS and self.field not in columns and set(PAIR) <= set(columns):
                    read = list(PAIR)
                elif self.field not in columns:
                    raise InvalidValueError(
                        f"{self.path}: there is no column {self.field!r}; there are {', '.join(map(repr, columns))}. Name the one with the text."
                    )
                for batch in file.iter_batches(batch_size=256, columns=read):
                    for record in batch.to_pylist():
                        row += 1
                        yield from pieces_of(record, self.field, f"{self.path}, row {row}")
        except InvalidValueError:
            raise
        except (arrow.ArrowException, OSError, ValueError) as error:  # damaged pages, and strings that are not UTF-8
            raise InvalidValueError(f"{self.path} can't be read as Parquet ({error}). Copy it again.") from error
        if not row:
            raise self._empty()
