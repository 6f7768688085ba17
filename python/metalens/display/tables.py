"""Tables of an evaluation, a reading, a plan, a roofline, the installation, and the models that lenses support."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from metalens.display.format import decimals, duration, gigabytes, operations, percent, rate, yes_or_no
from metalens.estimate.kernel_model import Fraction
from metalens.estimate.results import BYTES_PER_TOKEN, Plan
from metalens.estimate.roofline import Bounds
from metalens.evaluation import Evaluation, Transfer
from metalens.models.support import RIGHT, Module, remark
from metalens.ops.doctor import Diagnosis
from metalens.readings.numbering import UNTRANSLATED
from metalens.readings.reading import Reading
from metalens.readings.trajectory import Trajectory
from metalens.utils.token_display import readable

# ------------------------------------------------------------------ evaluation

# {field of Scores: (heading, format)}
SCORE_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "kl": ("KL", decimals),
    "ce": ("CE", decimals),
    "bits_per_byte": ("bits/byte", decimals),
    "top1": ("top-1", percent),
    "entropy": ("entropy", decimals),
    "bias": ("bias", decimals),
}
MODEL_COLUMNS = ("ce", "bits_per_byte", "entropy")  # the others compare with the model


def evaluation_table(evaluation: Evaluation, entropy: bool = False) -> Table:
    """Make a table with a row for each layer, and the logit lens and the tuned lens side by side.

    Columns are the KL to the model, the cross-entropy, bits per byte and the agreement with the model's top token.

    Args:
        evaluation: the evaluation. If it has logit_stats, the table shows the bias of each layer too.
        entropy: also show the entropy of the predictions.
    """
    biases = evaluation.bias
    names = ["kl", "ce", "bits_per_byte", "top1"]
    if entropy:
        names.append("entropy")
    if biases is not None:
        names.append("bias")
    lenses = {"logit": evaluation.logit}
    if evaluation.tuned is not None:
        lenses["tuned"] = evaluation.tuned
    table = Table(title=f"{evaluation.tokens} tokens; {_nats(names)} in nats per token")
    table.add_column("layer", justify="right")
    columns: list[list[float]] = []
    for lens, scores in lenses.items():
        for name in names:
            table.add_column(f"{lens} lens\n{SCORE_COLUMNS[name][0]}", justify="right")
            columns.append(biases[lens] if name == "bias" and biases is not None else [getattr(layer, name) for layer in scores])
    formats = [SCORE_COLUMNS[name][1] for _ in lenses for name in names]

    def errors(of: str = "") -> list[list[float] | None]:
        return [evaluation.standard_errors(lens + of, name) if name in ("kl", "ce") else None for lens in lenses for name in names]

    spreads, embedding = errors(), evaluation.embedding
    if embedding is not None:
        measured = ["" if name == "bias" else SCORE_COLUMNS[name][1](getattr(embedding[lens], name)) for lens in lenses for name in names]
        table.add_row("embedding", *_with_errors(measured, errors(" embedding"), 0))
    for layer, values in enumerate(zip(*columns, strict=True)):
        cells = _with_errors(_cells(formats, values), spreads, layer)
        if layer in evaluation.untranslated:
            cells[len(names) :] = ["-"] * len(names)
        table.add_row(str(layer), *cells)
    table.add_section()
    translated = evaluation.translated
    table.add_row("mean", *_cells(formats, [sum(column[i] for i in translated) / len(translated) for column in columns]))
    table.add_row("model", *(decimals(getattr(evaluation.model, name)) if name in MODEL_COLUMNS else "" for name in names))
    captions = ["±: standard error, by the spread over sequences."] if any(spreads) else []
    if evaluation.untranslated:
        captions.append(f"-: the lens does not translate this layer. The means are over the {len(translated)} layers that it translates.")
    table.caption = " ".join(captions) or None
    return table


def _with_errors(cells: list[str], errors: Sequence[list[float] | None], layer: int) -> list[str]:
    """Return cells with the standard errors of a layer behind those that have one."""
    return [cell if of_column is None else f"{cell} ±{decimals(of_column[layer])}" for cell, of_column in zip(cells, errors, strict=True)]


def closed_form_table(evaluation: Evaluation, closed_form: Evaluation) -> Table:
    """Make a table of the KL to the model [nats per token] of each layer: logit lens, closed form, trained lens, and their agreement.

    Args:
        evaluation: the evaluation of a trained lens.
        closed_form: the evaluation of the closed form that it began with, on the same text.
    """
    assert evaluation.tuned is not None
    assert closed_form.tuned is not None
    table = Table(title=f"{evaluation.tokens} tokens; KL(model || lens) in nats per token, top-1 agreement with the model")
    for column in ("layer", "logit lens KL", "closed form KL", "tuned lens KL", "logit lens top-1", "closed form top-1", "tuned lens top-1"):
        table.add_column(column, justify="right")
    lenses = (evaluation.logit, closed_form.tuned, evaluation.tuned)
    rows = [[*(layer.kl for layer in of_layer), *(layer.top1 for layer in of_layer)] for of_layer in zip(*lenses, strict=True)]
    formats = [decimals] * 3 + [percent] * 3
    for layer, row in enumerate(rows):
        table.add_row(str(layer), *_cells(formats, row))
    table.add_section()
    table.add_row("mean", *_cells(formats, [sum(column) / len(rows) for column in zip(*rows, strict=True)]))
    return table


def _nats(names: Sequence[str]) -> str:
    """Return the names of the columns that are in nats per token, as a list in words."""
    shown = ["KL(model || lens)", "cross-entropy", *(name for name in names if name in ("entropy", "bias"))]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _cells(formats: Sequence[Callable[[float], str]], values: Iterable[float]) -> list[str]:
    return [shown(value) for shown, value in zip(formats, values, strict=True)]


def transfer_table(transfer: Transfer, layers: Sequence[int] | None = None) -> Table:
    """Make a table of the transfer penalty: a row for each translator, a column for each block's output.

    Args:
        transfer: the matrices.
        layers: layers to show: those that the lens translates. None = all.
    """
    shown = range(len(transfer.penalty)) if layers is None else layers
    table = Table(title="transfer penalty: what a translator (row) costs on another block's output (column), nats per token")
    table.add_column("", justify="right")
    for layer in shown:
        table.add_column(str(layer), justify="right")
    for layer in shown:
        table.add_row(str(layer), *(f"{transfer.penalty[layer][column]:z.2f}" for column in shown))
    if len(shown) < len(transfer.penalty):
        table.caption = f"The {len(shown)} layers that the lens translates."
    return table


# ------------------------------------------------------------------ reading


def reading_table(reading: Reading, title: str, columns: int = 12) -> Table:
    """Make a table with a row for each layer and a column for each of the last tokens. Cells hold the top-k next tokens, best first.

    Args:
        reading: the reading.
        title: text above the table.
        columns: tokens to show.
    """
    first = max(0, len(reading.tokens) - columns)
    several = any(len(best) > 1 for positions in reading.predictions.values() for best in positions)
    table = Table(title=_title(title), show_lines=several)
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
    table = Table(title=_title(title), show_lines=False)
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


# ------------------------------------------------------------------ plan

MEMORY_LABELS = {
    "program": "program",
    "model": "model",
    "translators": "translators in training",
    "optimizer_state": "optimizer state",
    "gradients": "gradients",
    "hidden_states": "hidden states of a batch",
    "logits": "logits",
    "update": "update of a layer, beyond a batch",
    "float32_lens": "lens as float32, beyond a step",
    "warm_start": "warm start, beyond a step",
}
WORK_LABELS = {
    "forward": "forward pass of the model",
    "model_head": "head, for the model",
    "lens_head": "head, for the lens",
    "translators": "translators",
    "optimizer": "optimizer",
    "warm_start": "warm start",
}
TIME_LABELS = {"start": "loading the model", "warm_start": "warm start", "steps": "steps"}
DISK_LABELS = {"lens": "lens", "checkpoints": "checkpoints", "new_checkpoint": "one more checkpoint while it is written"}


def plan_table(plan: Plan, title: str) -> Table:
    """Make a table of a run's memory, text, work, time and disk, one after another."""
    table = _two_columns(title, justify="right")
    memory = {MEMORY_LABELS[name]: gigabytes(count) for name, count in asdict(plan.memory).items() if count}
    if not plan.facts.exact:
        memory = {f"{label} (estimated)" if label == "model" else label: size for label, size in memory.items()}
    _section(table, "memory", memory)
    _section(table, "memory", {"total at the peak": gigabytes(plan.total), "available": gigabytes(plan.available)})
    text = {
        "tokens needed": f"{plan.tokens_needed:,}",
        "size, about": gigabytes(plan.tokens_needed * BYTES_PER_TOKEN),
        "times read": str(plan.passes),
    }
    if plan.config.held_back_tokens:
        text["held back for the guard"] = f"{plan.config.held_back_tokens:,}"
    if plan.epochs is not None:
        text["epochs of the given text, about"] = f"{plan.epochs:.2f}"
    _section(table, "text", text)
    work = asdict(plan.flops_per_token)
    warm = work.pop("warm_start")
    if plan.config.num_steps:
        _section(table, "work", {WORK_LABELS[name]: f"{operations(flops)}/token" for name, flops in work.items() if flops})
    if warm:
        _section(table, "work", {WORK_LABELS["warm_start"]: operations(plan.warm_start_flops)})
    _section(table, "work", {"whole run": operations(plan.flops)})
    if plan.duration is not None:
        parts = {TIME_LABELS[name]: duration(seconds) for name, seconds in asdict(plan.duration).items() if seconds}
        _section(table, "time on this machine, about", {**parts, "whole run": duration(plan.duration.total)})
    _section(table, "disk", {DISK_LABELS[name]: gigabytes(count) for name, count in asdict(plan.disk).items()})
    return table


def plan_remarks(plan: Plan) -> list[str]:
    """Say in sentences whether a run fits, and which changes would make it fit."""
    needed = f"The run takes about {gigabytes(plan.total)} of {gigabytes(plan.available)}"
    lines = [f"{needed}: it fits." if plan.fits else f"{needed}: it does not fit."]
    for change in plan.advice:
        verdict = "fits" if change.fits else "does not fit either"
        lines.append(f"  {change.option}: {gigabytes(change.bytes)}, {', '.join(filter(None, [verdict, change.cost]))}.")
    if not plan.fits and not any(change.fits for change in plan.advice):
        lines.append(f"None of these fits. The model alone takes {gigabytes(plan.memory.model)}: quantize it to fewer bits.")
    if plan.short_budget is not None and plan.duration is not None:
        lines.append(f"It takes about {duration(plan.duration.total)} on this machine. --tokens {plan.short_budget} takes about ten minutes.")
    if not plan.share_known:
        lines.append(
            "Tokens are those of the answers. The model also reads the others, and how many these are is known once the text is tokenized: "
            "the run takes more time than this, and more text."
        )
    if plan.epochs is not None and plan.epochs > 1 and not plan.config.repeat:
        lines.append(
            f"The text holds about {plan.text_tokens} tokens, and the run needs {plan.tokens_needed}: "
            "give more text, add --repeat, or give a budget (--tokens) or smaller steps (--tokens-per-step)."
        )
    return lines


# ------------------------------------------------------------------ roofline

ROOFLINE_LABELS = {
    "statistics": "statistics, metalens",
    "statistics_plain_mlx": "statistics, plain MLX",
    "training": "training, metalens",
    "training_plain_mlx": "training, plain MLX",
    "training_in_16_bits": "training with 16-bit operands, metalens",
    "forward": "the model's forward pass",
    "training_and_forward": "training and forward, metalens",
    "sampled_training": "training with a sampled vocabulary",
    "sampled_training_and_forward": "the same and forward",
}


def roofline_table(bounds: Mapping[str, Bounds], title: str) -> Table:
    """Make a table with a column for each chip and a row for each task: tokens per second at most."""
    table = Table(title=_title(title))
    table.add_column("")
    for chip in bounds:
        table.add_column(chip, justify="right")
    for task, label in ROOFLINE_LABELS.items():
        table.add_row(label, *(rate(getattr(found, task)) for found in bounds.values()))
    return table


KERNEL_LABELS = {
    "lens_stats": "statistics",
    "lens_stats_one_token": "statistics of one token",
    "linear": "logits of a chunk",
    "lens_backward": "gradient of a chunk",
    "lens_kl": "loss and gradient",
}


def fractions_table(parts: Mapping[str, Mapping[str, Fraction]], title: str) -> Table:
    """Make a table with a column for each chip and a row for each kernel: percent of the chip's float32 peak, as `fraction_text` shows it."""
    table = Table(title=_title(title))
    table.add_column("")
    for chip in parts:
        table.add_column(chip, justify="right")
    for kernel, label in KERNEL_LABELS.items():
        table.add_row(label, *(fraction_text(kernels[kernel]) for kernels in parts.values()))
    return table


def fraction_text(part: Fraction) -> str:
    """Return percents of the peak: first design > now (plain MLX)."""
    return f"{100 * part.first:.0f} > {100 * part.now:.0f} ({100 * part.plain_mlx:.0f})"


# ------------------------------------------------------------------ installation and models


def diagnosis_facts(diagnosis: Diagnosis) -> dict[str, str]:
    """Return the facts of an installation by label."""
    facts = {
        "metalens": diagnosis.metalens,
        "mlx": diagnosis.mlx,
        "mlx-lm": diagnosis.mlx_lm,
        "Python": diagnosis.python,
        "platform": diagnosis.platform,
        "default device": diagnosis.device,
        "backend setting": diagnosis.backend,
        "precision setting": diagnosis.precision,
    }
    gpu, native = diagnosis.metal, diagnosis.native
    if gpu is None:
        facts["Metal"] = "not available here"
    else:
        compiled = f"{gpu.compiled_kernels} compiled ahead of time, others just in time" if gpu.compiled_kernels else "compiled just in time"
        facts |= {
            "Metal": f"{gpu.architecture}, tuned as generation {gpu.generation}",
            "GPU cores": f"{gpu.cores}" if gpu.cores_counted else f"not counted; planned for {gpu.cores}",
            "Metal kernels": compiled,
            "matrix units": gpu.matrix_units,
            "float32 products of plain MLX": gpu.float32_products,
        }
    if native is None:
        facts["native extension"] = f"not used: {diagnosis.native_problem}"
    else:
        facts |= {
            "native extension": "loaded",
            "instruction set": native.instruction_set,
            "instruction sets available": ", ".join(native.available_instruction_sets),
            "faster 16-bit products": yes_or_no(native.fast_bfloat16),
            "threads": str(native.threads),
            "largest difference from plain MLX": f"{native.largest_difference:.1e}",
            "speed beside plain MLX": f"{native.speedup:.0f}x ({native.product})",
        }
    return facts


def diagnosis_table(diagnosis: Diagnosis) -> Table:
    """Make a table of the facts of an installation, without its problems."""
    table = _two_columns("metalens doctor")
    table.columns[0].style = "bold"
    for name, value in diagnosis_facts(diagnosis).items():
        table.add_row(name, Text(value))
    return table


def support_table(found: Sequence[Module], title: str) -> Table:
    """Make a table with a row for each of mlx-lm's modules."""
    table = Table(title=_title(title))
    for column in ("module", "a lens", "remark"):
        table.add_column(column)
    for module in found:
        table.add_row(module.name, Text(module.status, style="" if module.status == RIGHT else "yellow"), Text(remark(module)))
    return table


def _title(text: str) -> Text:
    """Return a title as it is: a "[" in a path is no markup."""
    return Text(text, style="table.title")


def _two_columns(title: str, justify: str = "left") -> Table:
    table = Table(title=_title(title), show_header=False)
    table.add_column()
    table.add_column(justify="right" if justify == "right" else "left")
    return table


def _section(table: Table, kind: str, rows: Mapping[str, str]) -> None:
    for label, value in rows.items():
        table.add_row(f"{kind}: {label}", value)
    table.add_section()
