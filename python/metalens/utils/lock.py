"""A lock that one process at a time holds. The system releases it when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from metalens.utils.errors import MetalensError


class LockedError(MetalensError, OSError):
    """Another run writes where this one would write."""


@contextlib.contextmanager
def locked(path: Path, where: str) -> Iterator[None]:
    """Hold the lock of a file while the block runs. The file names the process, and is deleted at the end.

    Where the file system has no locks, every process goes on.

    Args:
        path: path of the lock's file, in a folder that exists.
        where: what is locked, for the error.

    Raises:
        LockedError: if another process, or another run in this one, holds the lock. It names the process.
        OSError: if the file can't be written.
    """
    handle = _acquire(path, where)
    try:
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)  # before the lock is released: after it, the file may be another's
            os.close(handle)


def _acquire(path: Path, where: str) -> int | None:
    """Return the open file of a lock that is held now, or None where there are no locks."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise LockedError(f"Another run ({holder}) writes to {where}. Wait for it, end it, or choose another place for this run.") from error
        except OSError:
            os.close(handle)
            path.unlink(missing_ok=True)
            return None
        # The holder before may have deleted the file between the two calls: then this lock is of a file without a name.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                _sign(handle)
                return handle
        os.close(handle)


def _sign(handle: int) -> None:
    """Write into the file of a lock who holds it, for the error of others. On a full disk it stays unknown, and the lock holds all the same."""
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.write(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
