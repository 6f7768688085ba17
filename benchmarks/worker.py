"""A competitor in a process of its own: for its memory, and for settings that are read once per process (METALENS_ISA).

    python -m benchmarks.worker operations.linear "metalens" '{"rows": 1, "inputs": 256, "outputs": 6000}'

makes the competitor, prints a line, and answers every line on stdin with one on stdout: "seconds" with the seconds of one call, "memory" with the
bytes by which the process's peak grew during one call.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from benchmarks.competitor import Competitor, LeftOutError

ROOT = Path(__file__).parent.parent
# Every block of 64 kB or more straight from the system and straight back, so that a peak is not hidden by memory that the allocator has kept.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Worker:
    """A competitor in a fresh process. A context manager; leaving it ends the process.

    Raises:
        LeftOutError: if the process ends instead of answering.
    """

    def __init__(self, module: str, name: str, arguments: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "benchmarks.worker", module, name, json.dumps(arguments)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | (environment or {}), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LeftOutError(f"Its process ended with code {self._process.wait()}.")
        return line.strip()

    def _ask(self, question: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def seconds(self) -> float:
        """Of one call."""
        return self._ask("seconds")

    def memory(self) -> float:
        """Bytes by which the process's peak grew during one call."""
        return self._ask("memory")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def extra_memory(module: str, name: str, arguments: dict[str, Any]) -> float | None:
    """Bytes that one call needs beyond its inputs, in a fresh process; None where the system does not tell (it is Linux that does)."""
    try:
        with Worker(module, name, arguments, RETURN_MEMORY) as worker:
            return worker.memory()
    except LeftOutError:
        return None


def _status(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return 1024.0 * int(match[1])


def _growth(competitor: Competitor) -> float:
    competitor.run(1)  # what only the first call allocates (threads, a library's own tables) is not the operation's
    gc.collect()
    mx.clear_cache()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
    before = _status("VmRSS")
    competitor.run(None)
    return max(0.0, _status("VmHWM") - before)


def main() -> None:
    """Serve stdin."""
    module, name, arguments = sys.argv[1:]
    competitor = importlib.import_module(f"benchmarks.{module}").make(name, **json.loads(arguments))
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            print(_growth(competitor), flush=True)
        else:
            competitor.run(1)
            print(competitor.seconds(), flush=True)


if __name__ == "__main__":
    main()
