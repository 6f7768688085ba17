"""The pages about the comparison, written from its results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from benchmarks.recipes.cases import FULL, LENGTH, LONG, MODELS, RECIPES, TEXTS

Entry = dict[str, Any]
LINES = ("logit lens", *RECIPES)
BUNDLED, PRETRAINED = ("demo", "small"), ("smollm2", "gemma3-270m")


def mean(values: Sequence[float]) -> float:
    """Return the mean over layers."""
    return float(np.mean(values))


def key(entry: Entry) -> tuple[Any, ...]:
    """Return what names a run: a newer result with another budget or other settings replaces it."""
    return tuple(entry["case"][name] for name in ("model", "text", "seed", "line", "variant"))


def select(found: Sequence[Entry], **wanted: Any) -> list[Entry]:
    """Return the entries whose case has the wanted values."""
    return [entry for entry in found if all(entry["case"][name] == value for name, value in wanted.items())]


def models_of(found: Sequence[Entry]) -> list[str]:
    """Return the models that have results, in the order of MODELS."""
    return [name for name in MODELS if select(found, model=name)]


# ---------------------------------------------------------------------- docs/recipes.md


def recipes(found: Sequence[Entry]) -> str:
    """Return docs/recipes.md: the mean over layers for each text, with the spread over seeds."""
    parts = [
        "# Recipes compared\n",
        "The tables show KL(model || lens) on held-out text, in nats per token, as the mean over the trained layers. All runs of a model have",
        f"the same number of training tokens (`tokens=`), a warm start's included, in sequences of {LENGTH}. Steps compare a sampled vocabulary,",
        "unless a line says otherwise; lenses are read with the full one. Two numbers with ± between them are the mean of two runs, which shuffle",
        "the text in two ways, and half their difference.\n",
        *(f"- Text `{name}`: {what}." for name, what in TEXTS.items()),
        "\n`fast 0.1.0` is `fast` with its settings of version 0.1.0: steps of fixed length, no guard. `mlxterp` reads the text in its order.",
        "`python -m benchmarks.recipes` measures all of it and writes this page. Lines that are missing have not been run.",
        "Core seconds are those of the whole training, on a machine that did other work beside it.",
        "[Recipes on pretrained models](real-models.md) has the layers.\n",
        "![KL of every layer](recipes.png)\n",
    ]
    for model in models_of(found):
        parts += _recipes_of_model(model, select(found, model=model))
    return "\n".join(parts) + "\n"


def _recipes_of_model(model: str, entries: list[Entry]) -> Iterator[str]:
    layers = entries[0]["layers"]
    texts = [text for text in TEXTS if select(entries, text=text)]
    tokens = f"{MODELS[model].tokens:,} training tokens, {MODELS[model].held_out:,} held-out tokens"
    yield f"## {model}\n\n{len(layers)} layers ({_listed(layers)}); {tokens}.\n"
    yield "| recipe | " + " | ".join(f"{text}: mean KL | worst layer beside ridge" for text in texts) + " | core seconds |"
    yield "|---|" + "---:|---:|" * len(texts) + "---:|"
    for line in LINES:
        of_line = select(entries, line=line, variant="")
        if of_line:
            cells = [cell for text in texts for cell in _cells(line, text, entries)]
            seconds = [entry["cpu_seconds"] for entry in of_line if "cpu_seconds" in entry]
            yield "| " + " | ".join([line, *cells, f"{np.median(seconds):.0f}" if seconds else "0"]) + " |"
    yield ""
    yield from _remarks(entries)


def _cells(line: str, text: str, entries: list[Entry]) -> list[str]:
    """Return the mean KL over seeds, and the largest ratio of a layer's KL to the closed form's."""
    of_line, of_ridge = (select(entries, line=name, text=text, variant="") for name in (line, "ridge"))
    if not of_line:
        return ["-", "-"]
    means = [mean(entry["kl"]) for entry in of_line]
    spread = f" ± {(max(means) - min(means)) / 2:.4f}" if len(means) > 1 else ""
    ratios = [
        max(ours / theirs for ours, theirs in zip(entry["kl"], ridge["kl"], strict=True) if theirs > 1e-6)  # the last layer's KL is 0
        for entry in of_line
        for ridge in of_ridge
        if ridge["case"]["seed"] == entry["case"]["seed"]
    ]
    return [f"{mean(means):.4f}{spread}", f"{max(ratios):.2f}" if ratios and line not in ("ridge", "logit lens") else "-"]


def _remarks(entries: list[Entry]) -> Iterator[str]:
    """Yield sentences about the runs with the full vocabulary and about the long ones."""
    for whole in select(entries, variant=FULL):
        sampled = _same(entries, whole, variant="", line="fast")
        if sampled:
            ours, theirs, times = mean(sampled["kl"]), mean(whole["kl"]), whole["cpu_seconds"] / sampled["cpu_seconds"]
            yield (
                f"`fast` with the full vocabulary reaches {theirs:.4f} on `{whole['case']['text']}` (sampled: {ours:.4f}, "
                f"{ours / theirs - 1:+.1%}) and takes {times:.1f} times the core seconds.\n"
            )
    for paper in select(entries, variant=LONG, line="paper"):
        short, long = _same(entries, paper, line="fast", variant=""), _same(entries, paper, line="fast")
        if short:
            of_paper, tokens = paper["case"]["tokens"], short["case"]["tokens"] / paper["case"]["tokens"]
            seconds = short["cpu_seconds"] / paper["cpu_seconds"]
            yield f"After {of_paper:,} tokens, `paper` reaches {mean(paper['kl']):.4f}" + (f" and `fast` {mean(long['kl']):.4f}." if long else ".")
            yield f"With {tokens:.1%} of these tokens and {seconds:.1%} of paper's core seconds, `fast` reaches {mean(short['kl']):.4f}.\n"


def _same(entries: list[Entry], entry: Entry, **other: Any) -> Entry | None:
    """Return the run that differs from `entry` in the given values only."""
    wanted = {name: entry["case"][name] for name in ("text", "seed", "line", "variant")} | other
    return next(iter(select(entries, **wanted)), None)


# ---------------------------------------------------------------------- docs/real-models.md


def real_models(found: Sequence[Entry]) -> str:
    """Return docs/real-models.md: every layer of the pretrained models, and what `plan` expected."""
    parts = [
        "# Recipes on pretrained models\n",
        "For each layer: KL(model || lens) in nats per token on held-out text, and in brackets the share of tokens whose most likely next token is",
        f"the model's, and the bias (KL of the mean predictions, nats). Sequences have {LENGTH} tokens. The runs are those of seed 0 in",
        "[Recipes compared](recipes.md), and `python -m benchmarks.recipes` measures and writes both pages.\n",
        "![Bias of every recipe on the pretrained models](real-models.png)\n",
    ]
    for model in [name for name in PRETRAINED if select(found, model=name)]:
        for text in TEXTS:
            parts += _layers_of(model, text, select(found, model=model, text=text, seed=0))
    parts += _plans(found)
    return "\n".join(parts) + "\n"


def _layers_of(model: str, text: str, entries: list[Entry]) -> Iterator[str]:
    if not entries:
        return
    yield f"## {model}, text `{text}`\n\n{MODELS[model].tokens:,} training tokens, {MODELS[model].held_out:,} held-out tokens.\n"
    yield "| recipe | mean KL | " + " | ".join(f"layer {i}" for i in entries[0]["layers"]) + " |"
    yield "|---|---:|" + "---:|" * len(entries[0]["layers"])
    for line in LINES:
        for entry in select(entries, line=line):
            name = line + (f", {entry['case']['variant']} vocabulary" if entry["case"]["variant"] == FULL else "")
            cells = [f"{kl:.3f} ({top1:.0%}, {bias:.2f})" for kl, top1, bias in zip(entry["kl"], entry["top1"], entry["bias"], strict=True)]
            yield "| " + " | ".join([name, f"{mean(entry['kl']):.4f}", *cells]) + " |"
    yield ""


def _plans(found: Sequence[Entry]) -> Iterator[str]:
    """Yield the table of what `plan` expected and what was measured."""
    yield "## Planned and measured\n"
    yield "What `metalens plan` expects for these runs, and what they took: the peak of the process, and the time of `train` alone. Other work ran on"
    yield "the machine beside some of them, so single times are uncertain. The largest and smallest ratio over texts and seeds are in brackets.\n"
    yield "| model | recipe | memory planned, MB | measured, MB | planned / measured | time planned, s | measured, s | planned / measured |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    for model in models_of(found):
        for line in ("ridge", "fast"):
            entries = [entry for entry in select(found, model=model, line=line, variant="") if "planned_bytes" in entry]
            if entries:
                memory, seconds = _ratio(entries, "planned_bytes", "peak_bytes", 1e6), _ratio(entries, "planned_seconds", "seconds", 1)
                yield "| " + " | ".join([model, line, *memory, *seconds]) + " |"


def _ratio(entries: list[Entry], planned: str, measured: str, unit: float) -> list[str]:
    """Return the medians of two values, and of their ratio with its range."""
    ratios = [entry[planned] / entry[measured] for entry in entries]
    medians = [f"{np.median([entry[name] for entry in entries]) / unit:,.0f}" for name in (planned, measured)]
    return [*medians, f"{np.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"]


def _listed(layers: Sequence[int]) -> str:
    """Return layer numbers in words."""
    whole = list(layers) == list(range(len(layers)))
    return f"all, {layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
