"""What several commands need: errors in one line, notes, output, and options that mean the same everywhere."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from metalens.utils.errors import InvalidValueError, MetalensError

if TYPE_CHECKING:
    from metalens.lenses.lens import TunedLens
    from metalens.model import InterpretableModel
    from metalens.training import Group
else:
    InterpretableModel = Group = TunedLens = Any  # take a while to import

DEFAULT_LENGTH = "[default: 512, or the model's context if that is shorter]"

F = TypeVar("F", bound=Callable[..., Any])


# ------------------------------------------------------------------ output

# Characters that JSON leaves as they are and that terminals obey: delete and C1 controls, and Unicode's direction marks.
UNSAFE = re.compile("[\\x7f-\\x9f\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069]")


def note(text: str) -> None:
    """Print a line on stderr. A stderr that cannot be written never stops a command."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True)


def _discard_unwritten_notes() -> None:
    """Send what stderr has not taken to nowhere: Python would try again at its end, and turn success into exit code 120."""
    with contextlib.suppress(AttributeError, ValueError):  # no stderr, or not a file
        try:
            sys.stderr.flush()
        except OSError:
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, sys.stderr.fileno())
                os.close(nowhere)


def print_json(value: Any) -> None:
    """Print JSON on stdout.

    JSON has no infinity: such a number, as in --gradient-clip inf, is written as "inf". Control characters and characters that turn the direction of
    the text are escaped, so that no token of a vocabulary can change the terminal.
    """
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    click.echo(UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def print_table(table: Any) -> None:
    """Print a table on stdout. Where stdout is no terminal, a line has up to 200 characters."""
    from rich.console import Console

    terminal = sys.stdout is not None and sys.stdout.isatty()
    Console(width=None if terminal else 200).print(table)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(f"Warning: {message}")


def one_clear_error(command: F) -> F:
    """Print the library's errors and the system's as one line on stderr, with exit code 1. Print warnings as lines on stderr too.

    Any other exception is a bug and shows its traceback. METALENS_DEBUG=1 shows the traceback of every error.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return command(*args, **kwargs)
        except BrokenPipeError:  # the reader of stdout has gone; click ends the command
            raise
        except (MetalensError, OSError) as error:
            if os.environ.get("METALENS_DEBUG"):
                raise
            raise click.ClickException(str(error)) from error
        finally:
            _discard_unwritten_notes()

    return wrapped  # type: ignore[return-value]


# ------------------------------------------------------------------ options


class FilePath(click.Path):
    """The path of a file or folder. '~' is the home of the user, also in --out=~/x, where shells leave it; an empty name is an error."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"path_type": Path, **kwargs})

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check and expand the name."""
        if value == "":
            self.fail("the name is empty. Is a variable of the shell not set?", param, ctx)
        return super().convert(os.path.expanduser(value), param, ctx)


class _RenamedOption(click.Option):
    """An option that also accepts older spellings, which the help text leaves out."""

    def __init__(self, *args: Any, old: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.old = list(old)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the parser accept the older spellings too."""
        spellings = self.opts
        self.opts = [*spellings, *self.old]
        super().add_to_parser(parser, ctx)
        self.opts = spellings


def renamed_option(*declarations: str, old: Sequence[str], **attributes: Any) -> Callable[[F], F]:
    """Add an option that also accepts older spellings, which the help text leaves out. Arguments as in `click.option`.

    Args:
        declarations: spellings of the option, and the name of its parameter.
        old: older spellings.
        attributes: attributes of the option.
    """
    return click.option(*declarations, cls=_RenamedOption, old=old, **attributes)


class SeveralFiles(click.Command):
    """A command whose --data takes several files in a row, as shells expand them: --data *.txt."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat --data before every file that follows it."""
        expanded: list[str] = []
        files: int | None = None  # number of files of the --data that is read. None = none is read
        for argument in args:
            if files is not None and argument.startswith("-"):
                expanded += [] if files else ["--data"]  # click says what is missing
                files = None
            if argument == "--data":
                files = 0
            elif files is not None:
                expanded += ["--data", argument]
                files += 1
            else:
                expanded.append(argument)
        return super().parse_args(ctx, [*expanded, "--data"] if files == 0 else expanded)


def data_options(*, required: bool, split: str = "train") -> Callable[[F], F]:
    """Add the options that say where the text is.

    Args:
        required: whether a text is needed.
        split: default split of hub data sets.
    """
    other = "The default of `train` is 'train'." if split == "test" else "The default of `eval` is 'test'."

    def add(command: F) -> F:
        command = click.option("--split", default=split, show_default=True, help=f"Split of hub data sets. {other}")(command)
        command = click.option("--field", default="text", show_default=True, help="Field or column that holds the text.")(command)
        return click.option(
            "--data",
            required=required,
            multiple=True,
            metavar="FILE...",
            help="UTF-8 text, JSON Lines or Parquet: files, folders, or hub data sets as hf:DATASET[:CONFIGURATION][@REVISION].",
        )(command)

    return add


def start_option(command: F) -> F:
    """Add --from."""
    return click.option(
        "--from",
        "start_from",
        type=FilePath(),
        metavar="LENS",
        help="Lens whose training goes on, in place of the warm start. Layers that are not trained keep its translators.",
    )(command)


def embedding_option(command: F) -> F:
    """Add --embedding, for commands that read texts."""
    return click.option("--embedding", is_flag=True, help="Also read the embedding's output, as the first layer, with the lens's translator for it.")(
        command
    )


def bos_option(command: F) -> F:
    """Add --no-bos."""
    return click.option(
        "--no-bos", is_flag=True, help="Leave out the tokens that the tokenizer puts before a text, such as <bos>. Models with one need it as a rule."
    )(command)


def lens_option(command: F) -> F:
    """Add --lens."""
    return click.option(
        "--lens",
        "lens_path",
        type=FilePath(),
        metavar="LENS",
        help="Tuned lens: a path as given to `train --out`, a folder or snapshot of tuned-lens, or hf:ID of a lens on the hub.  "
        "[default: the logit lens alone]",
    )(command)


def save_option(shows: str, old: Sequence[str] = ()) -> Callable[[F], F]:
    """Add --save PICTURE.

    Args:
        shows: content of the picture, for the help text.
        old: older spellings of the option.
    """
    return renamed_option(
        "--save",
        "picture",
        old=old,
        type=FilePath(),
        metavar="PICTURE",
        help=f"Also save a picture of {shows}, for example out.png.",
    )


def force_option(command: F) -> F:
    """Add --force."""
    return click.option("--force", is_flag=True, help="Replace files that metalens did not write. Files that are read are never replaced.")(command)


def parallel_option(command: F) -> F:
    """Add --parallel and --shard-model."""
    command = shard_option("divide among them, as many times smaller in each. --parallel is layers then")(command)
    return renamed_option(
        "--parallel",
        old=["--share"],
        type=click.Choice(["data", "layers"]),
        help="Work that the processes of mlx.launch divide among them: the sequences of every step, or the layers.  [default: data]",
    )(command)


def shard_option(how: str = "divide among them") -> Callable[[F], F]:
    """Add --shard-model."""
    return click.option("--shard-model", is_flag=True, help=f"Model that the processes of mlx.launch {how}.")


def json_option(command: F) -> F:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(command)


# ------------------------------------------------------------------ arguments

MOST_LAYERS = 10_000  # no model has as many; a typing error must not fill the memory


def parse_layers(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    """Read a list of layers: '0,4-6' is [0, 4, 5, 6]."""
    if value is None:
        return None
    layers: list[int] = []
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            found = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            found = range(0)
        if not found or found[-1] >= MOST_LAYERS:
            raise click.BadParameter(f"{value!r} is not a list of layer numbers like 0,4 or 0,4-7.")
        layers += found
    return layers


def sources_of(names: tuple[str, ...]) -> list[str | Path]:
    """Return the sources that --data names. Only a name with 'hf:' before it is a hub data set: a mistyped file must not be looked for there.

    Raises:
        InvalidValueError: for an empty name, which as a path would be the current folder.
    """
    if not all(names):
        raise InvalidValueError("A name of --data is empty. Is a variable of the shell not set?")
    return [name if name.startswith("hf:") else Path(name) for name in names]


def parallel_of(parallel: Literal["data", "layers"] | None, shard_model: bool) -> Literal["data", "layers"]:
    """Return what processes divide. Those that divide the model all read the same text (InvalidValueError)."""
    if shard_model and parallel == "data":
        raise InvalidValueError("--shard-model and --parallel data exclude each other: processes that divide the model all read the same text.")
    return parallel or ("layers" if shard_model else "data")


def sharding_group(shard_model: bool) -> Group:
    """Return the processes that divide the model: those of mlx.launch, or with shard_model=False this one alone."""
    from metalens.training import Group  # slow to import

    group = Group.from_environment("layers") if shard_model else Group()
    if shard_model and group.size == 1:
        note("There is one process, which loads the whole model. Start several with mlx.launch to divide it.")
    return group


def shared_lens(path: Path | None, group: Group, *, whole: bool) -> TunedLens | None:
    """Return the lens of --lens in every process. With whole=False others than the first have only the layers that they compute."""
    from metalens.training.lens_exchange import shared_lens as read  # slow to import

    return None if path is None else read(path, group, whole)


def load_model(name: str, group: Group | None = None) -> InterpretableModel:
    """Load a model, or this process's part of it. On a CPU its layers run on the native kernels."""
    from metalens import load  # slow to import

    return load(name, tensor_group=group)
