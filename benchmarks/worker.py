"""Run a competitor in a process of its own, to measure its memory, or for settings that a process reads only once (METALENS_ISA).

    python -m benchmarks.worker operations.linear "metalens" '{"rows": 1, "inputs": 256, "outputs": 6000}'

The process makes the competitor and prints a line. It then answers every line on stdin with one line on stdout: "seconds" with the
seconds of one call, "memory" with the bytes by which one call raised the process's peak.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from benchmarks.competitor import Competitor, LeftOutError
from benchmarks.interleaved import Side

ROOT = Path(__file__).parent.parent
# The allocator takes blocks of 64 kB or more directly from the system and returns them at once: memory that it kept would hide a peak.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Worker:
    """A competitor in a fresh process; a context manager that ends the process.

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
            raise LeftOutError(f"Its process ended with exit code {self._process.wait()}.")
        return line.strip()

    def _ask(self, question: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def seconds(self) -> float:
        """Return the seconds of one call."""
        return self._ask("seconds")

    def memory(self) -> float:
        """Return the bytes by which one call raised the process's peak."""
        return self._ask("memory")

    def side(self, name: str) -> Side:
        """Return this competitor as a side of a round, under `name`."""
        return Side(name, self.seconds, self.seconds(), self.seconds)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def extra_memory(module: str, name: str, arguments: dict[str, Any]) -> float | None:
    """Return the bytes that one call needs in a fresh process, without its inputs; None where the system does not report them (only Linux does)."""
    try:
        with Worker(module, name, arguments, RETURN_MEMORY) as worker:
            return worker.memory()
    except LeftOutError:
        return None


def _status(field: str) -> float:
    """Return VmRSS or VmHWM (its peak) of this process, in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return 1024.0 * int(match[1])


def peak_growth(call: Callable[[], Any]) -> tuple[Any, float]:
    """Run a call, and return its result and the bytes by which it raised the process's peak (0 where the system does not report them)."""
    gc.collect()
    mx.clear_cache()
    if not Path("/proc/self/clear_refs").exists():
        return call(), 0.0
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    result = call()
    return result, max(0.0, _status("VmHWM") - before)


def _growth(competitor: Competitor) -> float:
    """Run one call and return the bytes by which it raised the peak."""
    competitor.run(1)  # a library's threads and tables, which only the first call allocates, do not count as the operation's
    return peak_growth(lambda: competitor.run(None))[1]


def main() -> None:
    """Answer the questions on stdin."""
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
