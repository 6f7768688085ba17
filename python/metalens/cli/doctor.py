"""metalens doctor: what an installation can do."""

from __future__ import annotations

import sys

import click

from metalens.cli.common import json_option, note, one_clear_error, print_json, print_table


@click.command("doctor")
@json_option
@one_clear_error
def doctor_command(as_json: bool) -> None:
    """Show the backends and kernels that are in use here, and why others are not.

    The exit code is 1 if a problem was found.
    """
    from metalens.ops import doctor

    diagnosis = doctor.examine()
    if as_json:
        print_json(diagnosis.to_dict())
    else:
        from metalens.display.tables import diagnosis_table

        print_table(diagnosis_table(diagnosis))
        for problem in diagnosis.problems or ["Everything works."]:
            note(problem)
    if diagnosis.problems:
        sys.exit(1)
