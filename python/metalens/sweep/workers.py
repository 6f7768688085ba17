"""Run cells in several processes of this machine. Each takes the next cell when it has finished one."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from metalens.sweep.cells import Cell
from metalens.sweep.outcomes import Outcome

LOOK = 0.2  # seconds between two looks at `stop`


class _Worker:
    """A process that runs one cell at a time."""

    def __init__(self, out: Path, checkpoint_every: int, threads: int) -> None:
        environment = {"METALENS_NUM_THREADS": str(threads)} | os.environ
        self._process = subprocess.Popen(
            [sys.executable, "-m", "metalens.sweep.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.answers = cast("IO[bytes]", self._process.stdout)
        self.cell: Cell | None = None
        self.ended = False
        self._started = 0.0
        self._send([str(out), checkpoint_every])

    def start(self, cell: Cell) -> None:
        self.cell, self._started = cell, time.perf_counter()
        self._send(cell.to_dict())

    def _send(self, value: object) -> None:
        pipe = cast("IO[bytes]", self._process.stdin)
        with contextlib.suppress(BrokenPipeError):  # `outcome` says that the process has ended
            pipe.write(json.dumps(value).encode() + b"\n")
            pipe.flush()

    def outcome(self) -> Outcome:
        """Return how the cell ended. Call it when there is an answer."""
        cell, self.cell = self.cell, None
        assert cell is not None
        line = self.answers.readline()
        if not line:
            self.ended, status = True, self._process.wait()
            how = f"by signal {-status}" if status < 0 else f"with status {status}"
            return Outcome(cell, "failed", f"Its process ended {how}; is there enough memory for this number of jobs?")
        status, message = json.loads(line)
        return Outcome(cell, status, message, time.perf_counter() - self._started)

    def stop(self) -> None:
        """Ask the process to end, within a training step too."""
        with contextlib.suppress(BrokenPipeError):
            cast("IO[bytes]", self._process.stdin).close()

    def close(self) -> None:
        """Wait until the process has ended."""
        self.stop()
        self._process.wait()
        self.answers.close()


def run_in_processes(cells: Sequence[Cell], out: Path, jobs: int, checkpoint_every: int, stop: Callable[[], bool]) -> Iterator[Outcome]:
    """Run cells, and yield how each ended. Those that `stop` has kept from starting are left out.

    Args:
        cells: the cells.
        out: folder of the sweep.
        jobs: number of processes.
        checkpoint_every: steps between the checkpoints of a training run.
        stop: function that is asked several times a second. True ends the processes, with checkpoints.
    """
    waiting = deque(cells)
    threads = max(1, len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)) // jobs)
    workers = []
    with selectors.DefaultSelector() as answers:
        try:
            for _ in range(min(jobs, len(waiting))):
                workers.append(_start(answers, out, checkpoint_every, threads, waiting.popleft()))
            stopping = False
            while answers.get_map():
                if stop() and not stopping:
                    stopping = True
                    for worker in workers:
                        worker.stop()
                for key, _ in answers.select(LOOK):
                    worker = key.data
                    outcome = worker.outcome()
                    yield outcome
                    if waiting and not stopping and not worker.ended:
                        worker.start(waiting.popleft())
                        continue
                    answers.unregister(key.fileobj)
                    if waiting and not stopping:  # the process has ended: another takes its place
                        workers.append(_start(answers, out, checkpoint_every, threads, waiting.popleft()))
        finally:
            for worker in workers:
                worker.close()


def _start(answers: selectors.BaseSelector, out: Path, checkpoint_every: int, threads: int, cell: Cell) -> _Worker:
    worker = _Worker(out, checkpoint_every, threads)
    answers.register(worker.answers, selectors.EVENT_READ, worker)
    worker.start(cell)
    return worker
