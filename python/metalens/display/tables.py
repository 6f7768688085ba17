"""Tables for people: an evaluation, a reading, a plan, the state of the installation; and the picture of layer transfer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from metalens.estimate.memory import BYTES_PER_TOKEN, Plan, gigabytes
from metalens.evaluation import Evaluation, Transfer
from metalens.models.support import RIGHT, Module, remark
from metalens.readings.heat_map import readable
from metalens.readings.reading import Reading


def _decimals(value: float) -> str:
    return f"{value:z.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


# {what a table shows of each lens: (its column, how a number is written)}
COLUMNS = {"kl": ("KL", _decimals), "ce": ("CE", _decimals), "bits_per_byte": ("bits/byte", _decimals), "top1": ("top-1", _percent)}


def evaluation_table(evaluation: Evaluation, entropy: bool = False) -> Table:
    """One row per layer: KL to the model, cross-entropy, bits per byte and agreement, logit lens and tuned lens side by side.

    Args:
        evaluation: the numbers; one with logit_stats also has the bias in the table.
        entropy: also show the entropy of the predictions.
    """
    extra = ["entropy"] * entropy + ["bias"] * (evaluation.logit_stats is not None)
    columns = COLUMNS | {name: (name, _decimals) for name in extra}
    lenses = {"logit": evaluation.logit} | ({} if evaluation.tuned is None else {"tuned": evaluation.tuned})
    biases = evaluation.bias or {}
    units = "KL(model || lens), cross-entropy" + "".join(f", {name}" for name in extra)
    table = Table(title=f"{evaluation.tokens} tokens; {' and '.join(units.rsplit(', ', 1))} in nats per token")
    table.add_column("layer", justify="right")
    rows: list[list[float]] = [[] for _ in evaluation.logit]
    for lens, scores in lenses.items():
        for heading, _ in columns.values():
            table.add_column(f"{lens} lens\n{heading}", justify="right")
        for i, row in enumerate(rows):
            row += [biases[lens][i] if name == "bias" else getattr(scores[i], name) for name in columns]
    styles = [style for _ in lenses for _, style in columns.values()]

    def cells(values: Sequence[float]) -> list[str]:
        return [style(value) for style, value in zip(styles, values, strict=True)]

    for i, row in enumerate(rows):
        table.add_row(str(i), *cells(row))
    table.add_section()
    table.add_row("mean", *cells([sum(column) / len(rows) for column in zip(*rows, strict=True)]))
    shown = {name: getattr(evaluation.model, name) for name in ("ce", "bits_per_byte", "entropy")}
    table.add_row("model", *(style(shown[name]) if name in shown else "" for name, (_, style) in columns.items()))
    return table


def plan_table(plan: Plan, title: str) -> Table:
    """Memory, text, work and disk of a run, one after another."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(justify="right")

    def section(rows: dict[str, str]) -> None:
        for name, value in rows.items():
            table.add_row(name, value)
        table.add_section()

    about = "" if plan.facts.exact else " (estimated)"
    section({f"memory: {name}{about if name == 'model' else ''}": gigabytes(count) for name, count in plan.memory.items() if count})
    section({"memory: total at the peak": gigabytes(plan.total), "memory: available": gigabytes(plan.available)})
    config = plan.config
    text = {
        "text: tokens needed": f"{config.total_tokens:,}",
        "text: about as much": gigabytes(config.total_tokens * BYTES_PER_TOKEN),
        "text: times read": str(plan.passes),
    }
    section(text | ({} if plan.epochs is None else {"text: epochs of what was given, about": f"{plan.epochs:.2f}"}))
    section({f"work: {name}": f"{flops / 1e9:,.3f} GFLOP/token" for name, flops in plan.flops_per_token.items() if flops})
    section({"work: whole run": f"{plan.flops / 1e15:,.3g} PFLOP"})
    section({f"disk: {name}": gigabytes(count) for name, count in plan.disk.items()})
    return table


def transfer_table(transfer: Transfer) -> Table:
    """The transfer penalty: a row for each translator, a column for each block's output."""
    table = Table(title="transfer penalty: what a translator (row) costs on another block's output (column), nats per token")
    table.add_column("", justify="right")
    for layer in range(len(transfer.ce)):
        table.add_column(str(layer), justify="right")
    for layer, row in enumerate(transfer.penalty):
        table.add_row(str(layer), *(f"{value:z.2f}" for value in row))
    return table


def transfer_figure(transfer: Transfer, title: str = "") -> Figure:
    """A heat map of the transfer penalty: how many nats per token the next token costs more if a layer is read by another layer's translator."""
    penalty, size = transfer.penalty, max(4.0, 0.25 * len(transfer.ce) + 2.5)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(penalty, cmap="viridis", origin="lower", vmin=min(0.0, *map(min, penalty)))
    axes.set_xlabel("output of block")
    axes.set_ylabel("translator of block")
    if title:
        axes.set_title(title, parse_math=False)
    figure.colorbar(image, ax=axes, label="transfer penalty (nats per token)", shrink=0.9)
    return figure


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


def support_table(found: list[Module], title: str) -> Table:
    """A row for each of mlx-lm's modules."""
    table = Table(title=title)
    for column in ("module", "a lens", "remark"):
        table.add_column(column)
    for module in found:
        table.add_row(module.name, Text(module.status, style="" if module.status == RIGHT else "yellow"), Text(remark(module)))
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
