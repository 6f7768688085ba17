"""Parts that tables share."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text


def titled(text: str) -> Text:
    """Return a title as it is: a "[" in a path is no markup."""
    return Text(text, style="table.title")


def two_columns(title: str, justify: str = "left") -> Table:
    """Return an empty table of labels and values, without a heading."""
    table = Table(title=titled(title), show_header=False)
    table.add_column()
    table.add_column(justify="right" if justify == "right" else "left")
    return table


def add_section(table: Table, kind: str, rows: Mapping[str, str]) -> None:
    """Add labels of a kind with their values, and a line below."""
    for label, value in rows.items():
        table.add_row(f"{kind}: {label}", value)
    table.add_section()
