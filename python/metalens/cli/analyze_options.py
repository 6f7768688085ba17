"""What several analyses share: their options, which a command gets as one object, and the steps that follow from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from metalens.cli.common import FilePath, force_option, json_option, lens_option, note, one_clear_error, parse_layers, save_option
from metalens.lenses.opening import files_read
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import require_writable
from metalens.utils.outputs import picture_output, require_replaceable

if TYPE_CHECKING:
    from metalens.lenses.lens import Lens
else:
    Lens = Any  # takes a while to import

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


@dataclass(frozen=True)
class AnalysisOptions:
    """The options that every analysis has.

    Attributes:
        lens_path: name of the tuned lens; None = the logit lens alone.
        layers: blocks to read; None = all.
        seed: seed of random draws.
        as_json: print JSON instead of a table.
        picture: file for the figure; None = draw none.
        force: replace files that metalens did not write.
    """

    lens_path: Path | None
    layers: list[int] | None
    seed: int
    as_json: bool
    picture: Path | None = None
    force: bool = False

    def check(self, inputs: Sequence[Path]) -> None:
        """Find out before the work whether the figure can be written, and replaces none of the inputs."""
        if self.picture is None:
            return
        from metalens.readings.heat_map import picture_format

        picture_format(self.picture)
        require_writable(self.picture)
        of_lens = [] if self.lens_path is None else files_read(self.lens_path)
        require_replaceable([picture_output(self.picture)], force=self.force, inputs=[*inputs, *of_lens])

    def lenses(self) -> dict[str, Lens | None]:
        """Return the lenses to read with, by name: the logit lens, and the tuned lens if there is one."""
        if self.lens_path is None:
            return {"logit lens": None}
        from metalens.lenses.lens import as_lens

        return {"logit lens": None, "tuned lens": as_lens(self.lens_path)}

    def draw(self, figure: Callable[[], Any]) -> None:
        """Save the figure that a function makes, and say so, if one was asked for."""
        if self.picture is None:
            return
        from metalens.readings.heat_map import save_figure

        save_figure(figure(), self.picture, force=self.force)
        note(f"Picture written to {self.picture}.")


def analysis_options(shows: str | None) -> Callable[[F], F]:
    """Add the options of AnalysisOptions, which the command gets as `options`. Errors of the command are one clear line.

    Args:
        shows: what the figure of --save shows. None = the command draws none.
    """
    of_figure = [] if shows is None else [save_option(shows), force_option]
    added: list[Callable[[Any], Any]] = [
        lens_option,
        click.option("--layers", callback=parse_layers, metavar="0,4-7,...", help="Blocks to read.  [default: all]"),
        click.option("--seed", default=0, show_default=True, help="Seed of random draws."),
        *of_figure,
        json_option,
    ]
    return lambda command: with_options(added, gathered(AnalysisOptions, "options", one_clear_error(command)))


def gathered(kind: type[T], name: str, command: F) -> F:
    """Return a command that makes one object of the options that are its fields.

    Args:
        kind: a dataclass whose fields have the names of options.
        name: parameter of the command that gets the object.
        command: the command.
    """

    @functools.wraps(command)
    def wrapped(**given: Any) -> Any:
        found = {each.name: given.pop(each.name) for each in fields(kind) if each.name in given}  # type: ignore[arg-type]
        return command(**given, **{name: kind(**found)})

    return wrapped  # type: ignore[return-value]


def with_options(added: Sequence[Callable[[Any], Any]], command: F) -> F:
    """Return a command with options, in this order in its help."""
    for option in reversed(added):
        command = option(command)
    return command


def refuse(parameters: Mapping[str, str], reason: str) -> None:
    """Check that options were not given that the running command would not use.

    Args:
        parameters: {name of the parameter: spelling of the option}.
        reason: why they have no meaning, as a sentence.

    Raises:
        InvalidValueError: if one was given on the command line.
    """
    context = click.get_current_context()
    given = [spelling for name, spelling in parameters.items() if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given:
        raise InvalidValueError(f"{reason} Leave out {', '.join(given)}.")


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
