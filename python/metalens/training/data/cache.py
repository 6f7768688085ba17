"""Tokens on disk: written once, complete or not there, and opened as memory maps."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metalens.utils.errors import InvalidValueError
from metalens.utils.files import atomic_write, require_writable

DOCUMENTS = np.dtype("<u8")


def cache_folder(folder: str | Path | None = None) -> Path:
    """The given folder, else $METALENS_CACHE, else ~/.cache/metalens/tokens."""
    return Path(folder or os.environ.get("METALENS_CACHE") or "~/.cache/metalens/tokens").expanduser()


@dataclass(frozen=True)
class StoredTokens:
    """What the cache holds of one corpus.

    Attributes:
        ids: [tokens], uint16 or uint32, read-only and not in memory.
        documents: [documents + 1], the first token of each document, and the number of tokens.
        counts: further numbers about the text.
    """

    ids: np.ndarray
    documents: np.ndarray
    counts: dict[str, int]


class TokenCache:
    """A folder with three files per corpus: KEY.ids (little-endian), KEY.documents (uint64), and KEY.json, which is there when the others are whole.

    Args:
        folder: see `cache_folder`; made when something is written.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = cache_folder(folder)

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / f"{key}.{suffix}"

    def open(self, key: str) -> StoredTokens | None:
        """The tokens under a key; None if there are none, or something else than what was written."""
        try:
            record = json.loads(self._path(key, "json").read_text(encoding="utf-8"))
            dtype = np.dtype(str(record["dtype"]))
            counts = {str(name): int(value) for name, value in record["counts"].items()}
            maps = []
            for suffix, kind, items in (("ids", dtype, record["tokens"]), ("documents", DOCUMENTS, record["documents"] + 1)):
                path = self._path(key, suffix)
                if path.stat().st_size != items * kind.itemsize:
                    return None
                maps.append(np.memmap(path, kind, "r"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return StoredTokens(maps[0], maps[1], counts)

    def write(self, key: str, dtype: np.dtype[Any], documents: Iterable[tuple[np.ndarray, bool]], counts: dict[str, int]) -> StoredTokens:
        """Store tokens as they come. If that fails or is interrupted, nothing is stored.

        Args:
            key: the name.
            dtype: of the ids.
            documents: ids [n] and whether they start a document, in order.
            counts: kept with them; read after the last document.

        Raises:
            OSError: if the folder can't be written.
            ValueError: if there are no tokens.
        """
        require_writable(self._path(key, "json"))
        starts, tokens = [], 0
        with atomic_write(self._path(key, "ids")) as ids_path, atomic_write(self._path(key, "documents")) as documents_path:
            with ids_path.open("wb") as file:
                for ids, begins in documents:
                    if begins:
                        starts.append(tokens)
                    file.write(ids.astype(dtype, copy=False).tobytes())
                    tokens += ids.size
            if not tokens:
                raise InvalidValueError("There are no tokens in the text. Give text that is not empty.")
            documents_path.write_bytes(np.asarray([*starts, tokens], DOCUMENTS).tobytes())
        record = {"dtype": dtype.str, "tokens": tokens, "documents": len(starts), "counts": counts}
        with atomic_write(self._path(key, "json")) as path:
            path.write_text(json.dumps(record), encoding="utf-8")
        stored = self.open(key)
        if stored is None:
            raise OSError(f"What was written to {self.folder} can't be read back. Is something else deleting files there?")
        return stored

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """One process at a time, so that several do not tokenize the same text; what killed ones left half written is removed.

        Where the file system has no locks, all go on: they would write the same bytes, and each file is replaced at once.
        """
        path = self._path(key, "lock")
        require_writable(path)
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                yield
                return
            for left in self.folder.glob(f".{key}.*"):
                left.unlink(missing_ok=True)
            yield

    def _fact(self, name: str) -> Path:
        return self.folder / "facts" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"

    def recall(self, name: str) -> Any:
        """What was remembered under a name, or None."""
        try:
            fact = json.loads(self._fact(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return fact.get("value") if isinstance(fact, dict) and fact.get("name") == name else None

    def remember(self, name: str, value: Any) -> None:
        """Keep a JSON value under a name; in a folder that can't be written nothing is kept, which costs time only."""
        path = self._fact(name)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps({"name": name, "value": value}), encoding="utf-8")
