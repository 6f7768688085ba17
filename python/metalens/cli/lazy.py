"""Groups of commands that are imported when they run, so that --help answers at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import click


class LazyCommand(NamedTuple):
    """A command that is not imported yet.

    Attributes:
        module: the module of `metalens.cli` that has it, as <name>_command.
        help: the line that the help of its group shows.
    """

    module: str
    help: str


class LazyCommands(Mapping[str, click.Command]):
    """Commands by name, each imported when it is looked up."""

    def __init__(self, table: Mapping[str, LazyCommand]) -> None:
        self.table = table

    def __getitem__(self, name: str) -> click.Command:
        command: click.Command = getattr(import_module(f"metalens.cli.{self.table[name].module}"), f"{name}_command")
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)


class LazyGroup(click.Group):
    """A group that imports a command when it runs, and none to list them."""

    def __init__(self, *args: Any, table: Mapping[str, LazyCommand], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table
        self.commands = LazyCommands(table)  # type: ignore[assignment]

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(self.table)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help) for name, command in self.table.items()])
