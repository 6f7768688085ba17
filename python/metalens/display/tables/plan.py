"""The table of a plan, and what it says in sentences."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from metalens.display.format import duration, gigabytes, operations
from metalens.display.tables.parts import add_section, two_columns
from metalens.estimate.results import BYTES_PER_TOKEN, Plan

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
    "start_lens": "lens to start from",
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
    table = two_columns(title, justify="right")
    memory = {MEMORY_LABELS[name]: gigabytes(count) for name, count in asdict(plan.memory).items() if count}
    if not plan.facts.exact:
        memory = {f"{label} (estimated)" if label == "model" else label: size for label, size in memory.items()}
    add_section(table, "memory", memory)
    add_section(table, "memory", {"total at the peak": gigabytes(plan.total), "available": gigabytes(plan.available)})
    text = {
        "tokens needed": f"{plan.tokens_needed:,}",
        "size, about": gigabytes(plan.tokens_needed * BYTES_PER_TOKEN),
        "times read": str(plan.passes),
    }
    if plan.config.held_back_tokens:
        text["held back for the guard"] = f"{plan.config.held_back_tokens:,}"
    if plan.epochs is not None:
        text["epochs of the given text, about"] = f"{plan.epochs:.2f}"
    add_section(table, "text", text)
    work = asdict(plan.flops_per_token)
    warm = work.pop("warm_start")
    if plan.config.num_steps:
        add_section(table, "work", {WORK_LABELS[name]: f"{operations(flops)}/token" for name, flops in work.items() if flops})
    if warm:
        add_section(table, "work", {WORK_LABELS["warm_start"]: operations(plan.warm_start_flops)})
    add_section(table, "work", {"whole run": operations(plan.flops)})
    if plan.duration is not None:
        parts = {TIME_LABELS[name]: duration(seconds) for name, seconds in asdict(plan.duration).items() if seconds}
        add_section(table, "time on this machine, about", {**parts, "whole run": duration(plan.duration.total)})
    add_section(table, "disk", {DISK_LABELS[name]: gigabytes(count) for name, count in asdict(plan.disk).items()})
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
