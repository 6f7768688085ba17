"""Atomic writes: a reader never finds a partial file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# In the names of temporary files and folders. One with this mark that nobody has locked was left by a killed process.
MARK = "metalens-"
# Seconds after which such a file is deleted. A writer locks its file within this time.
LEFT_BEHIND = 60


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. Move it onto `path` if the block ends without an exception; else delete it.

    The file and its folder are forced to the disk, so that the file also survives a loss of power. Temporary files that
    killed processes left for the same path are deleted.

    Raises:
        OSError: if the file can't be written, for example because the disk is full; names `path`.
    """
    with naming(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{MARK}", suffix=path.suffix)
    temporary = Path(name)
    try:
        with naming(path):
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            remove_left_behind(path)
            yield temporary
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            # Files of mkstemp are private; a result must be as readable as any other new file.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, and delete it at the end if it still has its name.

    Temporary folders that killed processes left for the same path are deleted.

    Raises:
        OSError: if the folder can't be made; names `path`.
    """
    with naming(path):
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.{MARK}", suffix=path.suffix))
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        remove_left_behind(path)
        yield folder
    finally:
        os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system name `path` if it names a temporary file or folder of it, or nothing, as the error of a full disk at a flush."""
    try:
        yield
    except OSError as error:
        named = _about(path, error)
        if named is error:
            raise
        raise named from error


def _about(path: Path, error: OSError) -> OSError:
    """Return an error of the system with the name of the file. An error that names a file which is no temporary of it is returned as it is."""
    if error.filename is not None and f".{path.name}.{MARK}" not in str(error.filename):
        return error
    if error.errno is None:
        return type(error)(f"Can't write {path}: {error}")
    return OSError(error.errno, error.strerror, os.fspath(path))


def remove_left_behind(path: Path) -> None:
    """Delete the temporary files and folders for `path` that killed processes left: they are old, and nobody has locked them."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{MARK}[a-z0-9_]{{8}}{re.escape(path.suffix)}")
    for left in path.parent.iterdir():
        if not pattern.fullmatch(left.name):
            continue
        with contextlib.suppress(OSError):
            handle = os.open(left, os.O_RDONLY)
            try:
                if time.time() - os.fstat(handle).st_mtime > LEFT_BEHIND:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(handle)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk. File systems that can't do this are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits.

    Raises:
        OSError: if it can't be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_values(values: Mapping[str, Any], default: Callable[[Any], Any] | None = None) -> str:
    """Return the SHA-256 of values that JSON holds, independent of their order and layout.

    Args:
        values: the values.
        default: function that returns the JSON form of other values, as in `json.dumps`.
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=default).encode()).hexdigest()


def require_writable(path: Path) -> None:
    """Check before the work that `path` can be written: make missing parents and try a temporary file. Delete those that killed processes left.

    Raises:
        OSError: if it can't; names the path and the reason.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory")
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is a device or a pipe, which can't be replaced by a file")
        remove_left_behind(path)
        # Named like those of atomic_write, so that the next one deletes it if this process is killed here.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.{MARK}", suffix=path.suffix)
        os.close(handle)
        Path(name).unlink(missing_ok=True)  # missing_ok: TokenCache.lock deletes files that look left behind
    except OSError as error:
        raise type(error)(f"Can't write {path}: {error}. Choose a path in a folder that can be written.") from error
