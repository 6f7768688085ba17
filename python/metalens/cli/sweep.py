"""metalens sweep: train and measure many lenses, and write a report."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from metalens.cli.common import FilePath, force_option, note, one_clear_error
from metalens.utils.outputs import require_replaceable

if TYPE_CHECKING:
    from metalens.sweep.outcomes import Outcome


@click.command("sweep")
@click.argument("settings", type=FilePath(exists=True, dir_okay=False))
@click.option("--out", type=FilePath(file_okay=False), help="Folder of the results.  [default: that of the settings]")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes that work at the same time on this machine.  [default: that of the settings]")
@click.option("--list", "only_list", is_flag=True, help="Only list the lenses and whether each is finished.")
@force_option
@one_clear_error
def sweep_command(settings: Path, out: Path | None, jobs: int | None, only_list: bool, force: bool) -> None:
    """Train and measure a lens for every model, recipe, text and seed of SETTINGS, a TOML file, and write a report.

    The same command goes on where it stopped: what is finished is not run again, unless its settings have changed. Under mlx.launch every process
    takes a part of the work. The report is report.md and report.html in the folder of the results.
    """
    from metalens.sweep import Results, read_sweep, run_sweep, write_report
    from metalens.sweep.cells import lens_cells
    from metalens.sweep.report import report_outputs
    from metalens.training import Group, interruptible
    from metalens.training.interrupt import INTERRUPTED

    sweep = read_sweep(settings)
    sweep = sweep if out is None else replace(sweep, out=out)
    if only_list:
        for cell in lens_cells(sweep):
            click.echo(f"{'finished' if cell.result(sweep.out) else 'to run':>8}  {cell.title}")
        return
    require_replaceable(report_outputs(sweep.out), force=force)
    group = Group.from_environment(timeout=None)
    with interruptible() as stop:
        found = run_sweep(sweep, jobs=jobs, group=group, stop=stop, on_outcome=_note)
    if not group.writes:
        return
    results = Results(sweep.out, found.lenses, found.evaluations)
    files = write_report(results, sweep.title, found.failures, force=force)
    note(f"Report written to {files[1]} and {files[2].name}.")
    if found.stopped:
        note("The sweep was stopped. Go on with the same command.")
        sys.exit(INTERRUPTED)
    if found.failures:
        raise click.ClickException(f"{len(found.failures)} cells could not be run; the report names them. The same command tries them again.")


def _note(outcome: Outcome) -> None:
    after = {"done": f"{outcome.seconds:.1f} s", "stopped": outcome.message, "failed": outcome.message}[outcome.status]
    note(f"{outcome.cell.title}: {outcome.status}, {after}")
