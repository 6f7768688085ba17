"""Tokens on disk: written once, either complete or absent, checked when they are opened, and read as memory maps."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from metalens.utils.errors import InvalidValueError
from metalens.utils.files import atomic_write, require_writable, sha256_of, sha256_of_values

DOCUMENTS = np.dtype("<u8")
COUNTED = np.dtype(np.bool_)
RECORD = "record"  # key of a record's own SHA-256


def cache_folder(folder: str | Path | None = None) -> Path:
    """Return the given folder, else $METALENS_CACHE, else ~/.cache/metalens/tokens."""
    return Path(folder or os.environ.get("METALENS_CACHE") or "~/.cache/metalens/tokens").expanduser()


@dataclass(frozen=True)
class StoredTokens:
    """The tokens of one corpus in the cache.

    Attributes:
        ids: token ids [tokens], uint16 or uint32, read-only and memory-mapped.
        documents: first token of each document, and the number of tokens, [documents + 1].
        counts: further numbers about the text.
        counted: whether the prediction at each token counts in the loss, bool [tokens]. None = at every token.
    """

    ids: np.ndarray
    documents: np.ndarray
    counts: dict[str, int]
    counted: np.ndarray | None = None


class TokenCache:
    """A folder with three files per corpus: KEY.ids (little-endian), KEY.documents (uint64), and KEY.json, which exists when the others are whole.

    A corpus of which some tokens count has KEY.counted too (a byte for each token, 0 or 1). KEY.json has the SHA-256 of the others and of its own
    values; files of older versions lack one or both, and are not checked so far.

    Args:
        folder: the folder, see `cache_folder`. It is made when the first file is written.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = cache_folder(folder)

    def _path(self, key: str, suffix: str) -> Path:
        return self.folder / f"{key}.{suffix}"

    def open(self, key: str) -> StoredTokens | None:
        """Open the tokens under a key. Return None if there are none, or if the files are not as they were written: the text is tokenized again then.

        Cost: the files are read once, about a second per GB.
        """
        try:
            record = json.loads(self._path(key, "json").read_text(encoding="utf-8"))
            if not _is_whole(record):
                return None
            dtype = np.dtype(str(record["dtype"]))
            counts = {str(name): int(value) for name, value in record["counts"].items()}
            maps, hashes = [], record.get("sha256", {})
            files = [("ids", dtype, record["tokens"]), ("documents", DOCUMENTS, record["documents"] + 1)]
            for suffix, kind, items in [*files, *([("counted", COUNTED, record["tokens"])] if "counted" in hashes else [])]:
                path = self._path(key, suffix)
                if path.stat().st_size != items * kind.itemsize:
                    return None
                if suffix in hashes and sha256_of(path) != hashes[suffix]:
                    return None
                maps.append(np.memmap(path, kind, "r"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return StoredTokens(maps[0], maps[1], counts, maps[2] if len(maps) > 2 else None)

    def write(
        self, key: str, dtype: np.dtype[Any], documents: Iterable[tuple[np.ndarray, bool, np.ndarray | None]], counts: dict[str, int]
    ) -> StoredTokens:
        """Store tokens as they come. A write that fails or is interrupted stores nothing.

        Args:
            key: name of the corpus.
            dtype: type of the stored ids.
            documents: in order: ids [n], whether they start a document, and whether the prediction of each of them counts in the loss, bool [n].
                None = the prediction of every id, in all documents.
            counts: numbers that are stored beside the tokens; read after the last document.

        Raises:
            OSError: if the folder can't be written.
            InvalidValueError: if there are no tokens.
        """
        require_writable(self._path(key, "json"))
        starts, tokens, hashes = [], 0, {}
        with contextlib.ExitStack() as files:
            ids_path, documents_path = (files.enter_context(atomic_write(self._path(key, suffix))) for suffix in ("ids", "documents"))
            counted: IO[bytes] | None = None
            with ids_path.open("wb") as file:
                for ids, begins, predicted in documents:
                    if begins:
                        starts.append(tokens)
                    file.write(ids.astype(dtype, copy=False).tobytes())
                    if predicted is not None:
                        counted = counted or files.enter_context(files.enter_context(atomic_write(self._path(key, "counted"))).open("wb"))
                        # At the token before, so the first of all is left out, and nothing follows the last.
                        counted.write(predicted[0 if tokens else 1 :].astype(COUNTED).tobytes())
                    tokens += ids.size
            if not tokens:
                raise InvalidValueError("There are no tokens in the text. Give text that is not empty.")
            documents_path.write_bytes(np.asarray([*starts, tokens], DOCUMENTS).tobytes())
            if counted is not None:
                counted.write(b"\0")
                counted.flush()
                hashes["counted"] = sha256_of(Path(counted.name))
            hashes |= {"ids": sha256_of(ids_path), "documents": sha256_of(documents_path)}
        record = {"dtype": dtype.str, "tokens": tokens, "documents": len(starts), "counts": counts, "sha256": hashes}
        with atomic_write(self._path(key, "json")) as path:
            path.write_text(json.dumps(record | {RECORD: sha256_of_values(record)}), encoding="utf-8")
        stored = self.open(key)
        if stored is None:
            raise OSError(f"The tokens that were written to {self.folder} can't be read back. Check whether another program deletes files there.")
        return stored

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Let one process at a time tokenize a text, and delete partial files that killed processes left.

        Where the file system has no locks, all processes go on: they write the same bytes, and each file is replaced at once.
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
        return self.folder / "facts" / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.json"

    def recall(self, name: str) -> Any:
        """Return the value under a name, or None: a damaged one counts as forgotten."""
        try:
            fact = json.loads(self._fact(name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return fact.get("value") if isinstance(fact, dict) and fact.get("name") == name and _is_whole(fact) else None

    def remember(self, name: str, value: Any) -> None:
        """Keep a JSON value under a name. In a folder that can't be written nothing is kept, which costs time only."""
        path = self._fact(name)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                fact = {"name": name, "value": value}
                temporary.write_text(json.dumps(fact | {RECORD: sha256_of_values(fact)}), encoding="utf-8")


def _is_whole(record: dict[str, Any]) -> bool:
    """Return whether a record is as it was written. One of an older version has no hash of its own, and counts as whole."""
    values = dict(record)
    return bool(values.pop(RECORD, None) in (None, sha256_of_values(values)))
