"""What all commands need: errors in one line, notes, the model, output, and --data with several files."""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from metalens.model import InterpretableModel, load

DEFAULT_LENGTH = "[default: 512, or the model's context if that is shorter]"

notes = Console(stderr=True)
F = TypeVar("F", bound=Callable[..., Any])


def note(text: str) -> None:
    """A line on stderr."""
    notes.print(text, highlight=False, markup=False, soft_wrap=True)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(f"Warning: {message}")


def one_clear_error(command: F) -> F:
    """Turn the library's errors about input into one line on stderr and exit code 1; METALENS_DEBUG=1 shows where they came from.

    Its warnings become lines on stderr too.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return command(*args, **kwargs)
        except (ValueError, TypeError, OSError, AttributeError, RuntimeError, ImportError) as error:
            if os.environ.get("METALENS_DEBUG") or isinstance(error, (click.exceptions.Exit, click.Abort)):
                raise
            raise click.ClickException(str(error)) from error

    return wrapped  # type: ignore[return-value]


class SeveralFiles(click.Command):
    """A command whose --data takes several files in a row, as shells expand them: --data *.txt."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat --data before every file that follows it."""
        expanded: list[str] = []
        files: int | None = None  # that the list being read has so far
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


def sources_of(names: tuple[str, ...]) -> list[str | Path]:
    """What --data names: data sets of the hub have 'hf:' before them, so that a mistyped file is not looked for there."""
    return [name if name.startswith("hf:") else Path(name) for name in names]


def load_model(name: str) -> InterpretableModel:
    """A path, a hub id, or 'demo' for the bundled model; on the CPU its layers run on the native kernels."""
    return load(name)


def parse_layers(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    """'0,4-6' -> [0, 4, 5, 6]."""
    if value is None:
        return None
    layers: list[int] = []
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            found = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            found = range(0)
        if not found:
            raise click.BadParameter(f"{value!r} is not a list of layer numbers like 0,4 or 0,4-7.")
        layers += found
    return layers


def print_json(value: Any) -> None:
    """JSON alone on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(table: Any) -> None:
    """A table on stdout; as wide as it needs to be when stdout is not a terminal."""
    Console(width=None if sys.stdout.isatty() else 200).print(table)
