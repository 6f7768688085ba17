"""Options and steps that several analyses share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from metalens.cli.common import FilePath, note, parse_layers
from metalens.lenses.opening import files_read
from metalens.utils.files import require_writable
from metalens.utils.outputs import picture_output, require_replaceable

if TYPE_CHECKING:
    from metalens.lenses.lens import Lens
else:
    Lens = Any  # takes a while to import

F = TypeVar("F", bound=Callable[..., Any])

layers_option = click.option("--layers", callback=parse_layers, metavar="0,4-7,...", help="Blocks to read.  [default: all]")
seed_option = click.option("--seed", default=0, show_default=True, help="Seed of random draws.")


def questions_option(required: bool) -> Callable[[F], F]:
    """Add --questions."""
    return click.option(
        "--questions",
        "questions_path",
        required=required,
        type=FilePath(exists=True, dir_okay=False),
        metavar="FILE",
        help='JSON Lines of questions: {"context": "...", "choices": ["...", "..."], "answer": 0}, or without choices and with the answer\'s text.',
    )


def normalize_option(command: F) -> F:
    """Add --normalize."""
    return click.option(
        "--normalize",
        type=click.Choice(["none", "tokens", "characters"]),
        default="none",
        show_default=True,
        help="Length that the log-probability of a choice is divided by.",
    )(command)


def opened_lenses(lens_path: Path | None) -> dict[str, Lens | None]:
    """Return the lenses to read with, by name: the logit lens, and the tuned lens if there is one."""
    if lens_path is None:
        return {"logit lens": None}
    from metalens.lenses.lens import as_lens

    return {"logit lens": None, "tuned lens": as_lens(lens_path)}


def check_picture(picture: Path | None, force: bool, inputs: Sequence[Path], lens_path: Path | None) -> None:
    """Find out before the work whether the picture can be written."""
    if picture is None:
        return
    from metalens.readings.heat_map import picture_format

    picture_format(picture)
    require_writable(picture)
    require_replaceable([picture_output(picture)], force=force, inputs=[*inputs, *([] if lens_path is None else files_read(lens_path))])


def write_picture(figure: Any, picture: Path, force: bool) -> None:
    """Save a figure, and say so."""
    from metalens.readings.heat_map import save_figure

    save_figure(figure, picture, force=force)
    note(f"Picture written to {picture}.")
