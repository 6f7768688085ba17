"""A process that runs cells: `python -m metalens.sweep.worker`, started by `metalens.sweep.workers`.

It reads a cell as a line of JSON from stdin, and answers with a line of JSON on stdout. The end of stdin ends it: within a training step, if the
process that started it has ended, or wants it to stop.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from pathlib import Path

from metalens.sweep.cells import Cell
from metalens.sweep.measure import Cells
from metalens.sweep.outcomes import outcome_of


def main() -> None:
    """Answer cells until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    read = sys.stdin.fileno()
    lines = _Lines(read)
    out, checkpoint_every = json.loads(lines.next())
    cells = Cells(Path(out), checkpoint_every, lambda: bool(select.select([read], [], [], 0)[0]))
    while line := lines.next():
        outcome = outcome_of(cells, Cell(**json.loads(line)))
        answers.write(json.dumps([outcome.status, outcome.message]) + "\n")
        answers.flush()


class _Lines:
    """Reads lines of a file descriptor without reading ahead of the writer, which waits for the answer to each."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""

    def next(self) -> bytes:
        """Return the next line, b'' at the end."""
        while b"\n" not in self._rest:
            part = os.read(self._descriptor, 1 << 16)
            if not part:
                return b""
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line + b"\n"


if __name__ == "__main__":
    main()
