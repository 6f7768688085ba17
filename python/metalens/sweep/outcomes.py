"""How a cell ended."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from metalens.sweep.cells import Cell
from metalens.sweep.measure import Cells
from metalens.training import TrainingInterruptedError
from metalens.utils.errors import MetalensError


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Attributes:
        cell: the cell.
        status: 'done', 'failed' or 'stopped'.
        message: why, unless it is done.
        seconds: time that it took.
    """

    cell: Cell
    status: Literal["done", "failed", "stopped"]
    message: str = ""
    seconds: float = 0.0


def outcome_of(cells: Cells, cell: Cell) -> Outcome:
    """Run a cell in this process. Errors that a user can mend are an outcome: the other cells go on."""
    start = time.perf_counter()
    try:
        cells.run(cell)
    except TrainingInterruptedError as interruption:
        return Outcome(cell, "stopped", str(interruption))
    except (MetalensError, OSError) as error:
        return Outcome(cell, "failed", str(error))
    return Outcome(cell, "done", "", time.perf_counter() - start)
