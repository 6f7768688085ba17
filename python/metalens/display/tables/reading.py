"""Tables of a reading, and of chosen tokens of a trajectory."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from metalens.display.format import percent
from metalens.display.tables.parts import titled
from metalens.readings.numbering import UNTRANSLATED
from metalens.readings.reading import Reading
from metalens.readings.trajectory import Trajectory
from metalens.utils.token_display import readable


def reading_table(reading: Reading, title: str, columns: int = 12) -> Table:
    """Make a table with a row for each layer and a column for each of the last tokens. Cells hold the top-k next tokens, best first.

    Args:
        reading: the reading.
        title: text above the table.
        columns: tokens to show.
    """
    first = max(0, len(reading.tokens) - columns)
    several = any(len(best) > 1 for positions in reading.predictions.values() for best in positions)
    table = Table(title=titled(title), show_lines=several)
    if first:
        table.caption = f"The last {columns} of {len(reading.tokens)} tokens. --json and --save have more."
    table.add_column("", justify="right", no_wrap=True)
    for token in reading.tokens[first:]:
        table.add_column(Text(readable(token)), no_wrap=True)
    for layer, positions in reversed(reading.predictions.items()):
        table.add_row(reading.label(layer), *(Text("\n".join(readable(token) for _, _, token in best)) for best in positions[first:]))
    table.add_section()
    table.add_row("model", *(Text(readable(token)) for token in reading.model_tokens[first:]))
    if set(reading.untranslated) & set(reading.layers):
        table.caption = f"{table.caption} {UNTRANSLATED}" if table.caption else UNTRANSLATED
    return table


def chosen_table(trajectory: Trajectory, title: str, columns: int = 8) -> Table:
    """Make a table of chosen tokens: a row for each layer, and for each token its probability and rank at the last positions.

    Args:
        trajectory: a trajectory with chosen tokens.
        title: text above the table.
        columns: positions to show.
    """
    t = trajectory
    first = max(0, len(t) - columns)
    table = Table(title=titled(title), show_lines=False)
    if first:
        table.caption = f"The last {columns} of {len(t)} tokens. --out has all."
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("token", no_wrap=True)
    for token in t.tokens[first:]:
        table.add_column(Text(readable(token)), no_wrap=True, justify="right")
    for row, layer in reversed(list(enumerate(t.layers))):
        for i, chosen in enumerate(t.chosen_ids):
            cells = zip(t.chosen_probabilities[i, row, first:], t.chosen_ranks[i, row, first:], strict=True)
            label = t.label(layer) if i == 0 else ""
            table.add_row(label, Text(readable(t.texts[chosen])), *(f"{percent(float(p))} #{rank}" for p, rank in cells))
    return table


def chosen_remarks(trajectory: Trajectory) -> list[str]:
    """Say for each chosen token which layer is the first to have it on top at the last position."""
    lines = []
    for token_id in trajectory.chosen_ids:
        layer = trajectory.chosen(token_id).first_on_top()
        name = readable(trajectory.texts[token_id])
        where = "is on top in no layer" if layer is None else f"is first on top in {trajectory.label(layer)}"
        lines.append(f"{name} {where}, as the token after the last one.")
    return lines
