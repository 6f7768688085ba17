"""Tables for people: an evaluation, a reading, the state of the installation."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from metalens.evaluate import Evaluation, Scores
from metalens.plotting import readable
from metalens.readout import Reading


def evaluation_table(evaluation: Evaluation) -> Table:
    """One row per layer: KL to the model, cross-entropy, bits per byte and agreement, logit lens and tuned lens side by side."""
    lenses = ["logit lens"] + (["tuned lens"] if evaluation.tuned is not None else [])
    table = Table(title=f"{evaluation.tokens} tokens; KL(model || lens) and cross-entropy in nats per token")
    table.add_column("layer", justify="right")
    for lens in lenses:
        for column in ("KL", "CE", "bits/byte", "top-1"):
            table.add_column(f"{lens}\n{column}", justify="right")
    for i, logit in enumerate(evaluation.logit):
        cells = _cells(logit)
        if evaluation.tuned is not None:
            cells += _cells(evaluation.tuned[i])
        table.add_row(str(i), *cells)
    means = _cells(_mean(evaluation.logit)) + (_cells(_mean(evaluation.tuned)) if evaluation.tuned is not None else [])
    table.add_section()
    table.add_row("mean", *means)
    table.add_row("model", "", f"{evaluation.model.ce:.3f}", f"{evaluation.model.bits_per_byte:.3f}", "", *[""] * (4 * (len(lenses) - 1)))
    return table


def _cells(s: Scores) -> list[str]:
    return [f"{s.kl:.3f}", f"{s.ce:.3f}", f"{s.bits_per_byte:.3f}", f"{100 * s.top1:.1f} %"]


def _mean(scores: list[Scores]) -> Scores:
    n = len(scores)
    return Scores(*(sum(getattr(s, name) for s in scores) / n for name in ("kl", "ce", "bits_per_byte", "top1")))


def reading_table(reading: Reading, title: str, columns: int = 12) -> Table:
    """Layers down, the last `columns` tokens across; in each cell the top-k next tokens, best first."""
    first = max(0, len(reading.tokens) - columns)
    table = Table(title=title, show_lines=any(len(p) > 1 for rows in reading.predictions.values() for p in rows))
    table.add_column("", justify="right", no_wrap=True)
    for token in reading.tokens[first:]:
        table.add_column(Text(readable(token)), no_wrap=True)
    for layer, positions in reversed(reading.predictions.items()):
        table.add_row(f"layer {layer}", *(Text("\n".join(readable(token) for _, _, token in best)) for best in positions[first:]))
    table.add_section()
    table.add_row("model", *(Text(readable(token)) for token in reading.model_tokens[first:]))
    return table


def facts_table(facts: dict[str, Any], title: str) -> Table:
    """Names and values."""
    table = Table(title=title, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in facts.items():
        table.add_row(name, Text(", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return table


def roofline_table(bounds: dict[str, dict[str, float]], title: str) -> Table:
    """A column for each chip, a row for each task: tokens per second at most."""
    table = Table(title=title)
    table.add_column("")
    for chip in bounds:
        table.add_column(chip, justify="right")
    for task in next(iter(bounds.values())):
        table.add_row(task, *(f"{tasks[task]:,.0f}" if tasks[task] >= 100 else f"{tasks[task]:.1f}" for tasks in bounds.values()))
    return table
