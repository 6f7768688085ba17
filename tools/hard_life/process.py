"""Run a command in a forked process, which is killed at a chosen moment if asked."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LIMIT = 600  # seconds, after which a process is ended
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        code: its exit code, or -N for signal N.
        said: what it wrote on stdout and stderr.
    """

    code: int
    said: str

    @property
    def crashed(self) -> bool:
        """Return whether it ended in another way than by an exit code of its own, or showed a traceback."""
        return self.code < 0 or "Traceback (most recent call last)" in self.said


class Process:
    """A function that runs in a forked process, in a folder. Fork before the first use of MLX.

    Args:
        function: the function.
        folder: the folder.
        log: file for what it writes.
        environment: further variables of the environment.
    """

    def __init__(self, function: Callable[[], object], folder: Path, log: Path, environment: dict[str, str]) -> None:
        self.log = log
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            signal.alarm(LIMIT)
            os.chdir(folder)
            os.environ.update(environment)
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            function()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def end(self) -> Ended:
        """Wait for its end."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return Ended(code, self.log.read_text(errors="replace"))


def at_every_change(folder: Path, then: Callable[[], object]) -> None:
    """Call a function before every change that this process makes to the files of a folder, and before every fsync.

    What C++ writes by a path of its own is not noticed; such a file is renamed afterwards, which is.
    """
    root = os.path.realpath(folder) + os.sep

    def inside(path: object) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        return os.path.realpath(os.fsdecode(path)).startswith(root)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) != 0
            if changes and inside(path):
                then()
        elif event in CHANGES and inside(arguments[0]):
            then()

    fsync = os.fsync

    def fsync_after(handle: int) -> None:
        then()
        fsync(handle)

    os.fsync = fsync_after
    sys.addaudithook(hook)
