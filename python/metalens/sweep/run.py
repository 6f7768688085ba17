"""Run a sweep: train every lens, measure every lens, write the report. What is finished stays finished.

The cells are divided among processes in one of two ways: `jobs` processes of this machine take the next cell each, or the processes that mlx.launch
has started take every n-th one. A cell's result depends on neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from metalens.sweep.cells import Cell, evaluation_cells, lens_cells
from metalens.sweep.measure import Cells
from metalens.sweep.outcomes import Outcome, outcome_of
from metalens.sweep.settings import Sweep
from metalens.sweep.workers import run_in_processes
from metalens.training import Group
from metalens.utils.lock import locked

LOCK = ".lock"


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended.

    Attributes:
        lenses, evaluations: the cells; without lenses that could not be trained, their evaluations are missing.
        failures: {title of a cell: the reason}.
        stopped: whether it was asked to stop before its end.
    """

    lenses: list[Cell]
    evaluations: list[Cell]
    failures: dict[str, str]
    stopped: bool


def run_sweep(
    sweep: Sweep,
    *,
    jobs: int | None = None,
    group: Group | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> SweepResult:
    """Run the cells of a sweep that are not finished.

    A cell that can't be run is left out, and the others go on. `metalens.sweep.report.write_report` writes the report.

    Args:
        sweep: the settings.
        jobs: processes that work at the same time on this machine. None = `sweep.jobs`.
        group: processes that mlx.launch has started, which share the folder `sweep.out`: each takes every n-th cell, and must make the same call.
            None = this process alone.
        stop: function that is asked within and after every training step. True ends the sweep; an unfinished run has a checkpoint.
        on_outcome: function of the outcome of every cell that this process runs, or has run.

    Raises:
        LockedError: if another sweep writes to the folder.
        InvalidValueError: if a model or a text is not there.
        OSError: if a file can't be read or written.
    """
    group = group or Group()
    jobs = sweep.jobs if jobs is None else jobs
    with contextlib.ExitStack() as locks:
        with group.together():
            sweep.out.mkdir(parents=True, exist_ok=True)
            if group.writes:
                locks.enter_context(locked(sweep.out / LOCK, str(sweep.out)))
        lenses = lens_cells(sweep)
        runner = _Runner(sweep, jobs, group, stop, on_outcome)
        runner.run(lenses)
        evaluations = evaluation_cells(sweep, lenses, sweep.out)
        if not runner.stopped:
            runner.run(evaluations)
        return SweepResult(lenses, evaluations, runner.failures, runner.stopped)


class _Runner:
    """Runs the cells of one phase after the other."""

    def __init__(self, sweep: Sweep, jobs: int, group: Group, stop: Callable[[], bool], on_outcome: Callable[[Outcome], None]) -> None:
        self.sweep, self.jobs, self.group, self.stop, self.on_outcome = sweep, jobs, group, stop, on_outcome
        self.failures: dict[str, str] = {}
        self.stopped = False
        self._cells = Cells(sweep.out, sweep.checkpoint_every, stop)

    def run(self, cells: Sequence[Cell]) -> None:
        """Run this process's part of the cells, and wait for the other processes."""
        mine = [cell for cell in cells[self.group.rank :: self.group.size] if cell.result(self.sweep.out) is None]
        failures: dict[str, str] = {}
        left = len(mine)
        with self.group.together():
            for outcome in self._outcomes(mine):
                self.on_outcome(outcome)
                left -= outcome.status != "stopped"
                if outcome.status == "failed":
                    failures[outcome.cell.title] = outcome.message
        for theirs, stopped in self.group.gather_json([failures, left > 0]):
            self.failures |= theirs
            self.stopped |= stopped

    def _outcomes(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        if min(self.jobs, len(cells)) > 1:
            yield from run_in_processes(cells, self.sweep.out, self.jobs, self.sweep.checkpoint_every, self.stop)
            return
        for cell in cells:
            outcome = outcome_of(self._cells, cell)
            yield outcome
            if outcome.status == "stopped":
                return
