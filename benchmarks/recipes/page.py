"""The pages about the comparison, written from its results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from benchmarks import planned
from benchmarks.recipes.cases import ALL, EIGHTH, FULL, LENGTH, LONG, MODELS, RECIPES, TEXTS
from benchmarks.recipes.select import (
    LINES,
    PRETRAINED,
    Entry,
    layer_ratios,
    mean,
    mean_ratios,
    models_of,
    same,
    select,
    texts_of,
    with_range,
    with_spread,
)
from benchmarks.recipes.verdicts import targets

# ---------------------------------------------------------------------- docs/recipes.md


def recipes(found: Sequence[Entry]) -> str:
    """Return docs/recipes.md: the mean over layers for each text, with the spread over seeds and texts."""
    parts = [
        "# Recipes compared\n",
        "`python -m benchmarks.recipes` trains a lens with every recipe, on four models, two texts and two seeds, and writes this page. The numbers",
        "are KL(model || lens) on held-out text, by the full vocabulary, in nats per token, as the mean over the trained layers. All runs of a",
        f"model have the same number of training tokens (`tokens=`), a warm start's included, in sequences of {LENGTH}. They train with a sampled",
        "vocabulary, unless a line says otherwise. `paper` and `adam` train without the embedding's translator here (`embedding=False`).\n",
        *(f"- Text `{name}`: {what}." for name, what in TEXTS.items()),
        "- ± is half the difference between two seeds, which shuffle the text in two ways.",
        "- *Beside `fast`*: the KL of `fast` divided by the line's, as the mean over texts and seeds, with the smallest and the largest. Below 1,",
        "  `fast` is better.",
        "- *Worst layer*: the largest ratio, over layers, texts and seeds, of a layer's KL to that of its closed form (`ridge`).",
        "- `fast 0.1.0`: `fast` with its settings of version 0.1.0, which are steps of fixed length without a guard.\n",
        "A line that is missing has not been run. The runs come from machines of two kinds, so this page has no times:",
        "[Time to quality](time-to-quality.md) has them. [Recipes on pretrained models](real-models.md) has the layers.\n",
        "## What was to be shown\n",
        *(str(target) for target in targets(found)),
        "",
    ]
    for model in models_of(found):
        parts += _recipes_of_model(model, select(found, model=model))
    return "\n".join(parts).rstrip() + "\n"


def _recipes_of_model(model: str, entries: list[Entry]) -> Iterator[str]:
    layers = next(entry["layers"] for entry in entries if entry["case"]["variant"] != ALL)
    texts = texts_of(entries)
    tokens = f"{MODELS[model].tokens:,} training tokens, {MODELS[model].held_out:,} held-out tokens"
    yield f"## {model}\n\n{len(layers)} layers ({_listed(layers)}); {tokens}.\n"
    yield f"![KL of every layer of {model}, for each recipe](recipes-{model}.png)\n"
    yield "| recipe | " + " | ".join(f"`{text}`: mean KL" for text in texts) + " | beside `fast` | worst layer |"
    yield "|---|" + "---:|" * len(texts) + "---:|---:|"
    for line in LINES:
        of_line = select(entries, line=line, variant="")
        if of_line:
            ratios = [] if line in ("fast", "logit lens") else mean_ratios(entries, "fast", line)
            cells = [_mean_cell(select(of_line, text=text)) for text in texts]
            yield "| " + " | ".join([line, *cells, with_range(ratios) if ratios else "", _worst(of_line, entries)]) + " |"
    yield ""
    yield from _remarks(entries)


def _mean_cell(entries: list[Entry]) -> str:
    return with_spread([mean(entry["kl"]) for entry in entries]) if entries else "-"


def _worst(of_line: list[Entry], entries: list[Entry]) -> str:
    """Return the largest ratio of a layer's KL to the closed form's."""
    pairs = [(entry, same(entries, entry, line="ridge")) for entry in of_line if entry["case"]["line"] not in ("ridge", "logit lens")]
    ratios = [max(layer_ratios(ours, ridge).values()) for ours, ridge in pairs if ridge is not None]
    return f"{max(ratios):.2f}" if ratios else ""


def _remarks(entries: list[Entry]) -> Iterator[str]:
    """Yield sentences about the runs with the full vocabulary, about the long ones, and about those of all layers."""
    for whole in select(entries, variant=FULL):
        sampled = same(entries, whole, variant="")
        if sampled:
            line, ours, theirs = whole["case"]["line"], mean(sampled["kl"]), mean(whole["kl"])
            text = f"With equal tokens `{line}` reaches {theirs:.4f} on `{whole['case']['text']}` with the full vocabulary"
            yield f"{text}, and {ours:.4f} with the sampled one ({ours / theirs - 1:+.2%}).\n"
    for variant in (EIGHTH, LONG):
        for line in RECIPES:
            if longer := select(entries, variant=variant, line=line):
                tokens, reached = longer[0]["case"]["tokens"], with_spread([mean(entry["kl"]) for entry in longer])
                yield f"After {tokens:,} tokens, `{line}` reaches {reached} on `{longer[0]['case']['text']}`.\n"
    for entry in select(entries, variant=ALL):
        yield from _all_layers(entry, same(entries, entry, variant=""))


def _all_layers(entry: Entry, few: Entry | None) -> Iterator[str]:
    """Yield a paragraph about a run of all layers, beside the run of a few of them."""
    kl = dict(zip(entry["layers"], entry["kl"], strict=True))
    text = f"`{entry['case']['line']}` on all {len(kl)} layers ({entry['case']['tokens']:,} tokens, `{entry['case']['text']}`) reaches a mean of"
    yield f"{text} {mean(entry['kl']):.4f}. Layer by layer: " + ", ".join(f"{value:.3f}" for value in entry["kl"]) + "."
    if few is not None:
        there = mean([kl[layer] for layer in few["layers"]])
        yield f"The layers of the table have {there:.4f} there, and {mean(few['kl']):.4f} when they are trained alone."
    yield ""


# ---------------------------------------------------------------------- docs/real-models.md


def real_models(found: Sequence[Entry]) -> str:
    """Return docs/real-models.md: every layer of the pretrained models, and what `plan` expected."""
    parts = [
        "# Recipes on pretrained models\n",
        "For each layer: KL(model || lens) in nats per token on held-out text. In brackets: the share of tokens whose most likely next",
        f"token is the model's, and the bias (KL of the mean predictions, nats). Sequences have {LENGTH} tokens. Where two seeds have been",
        "run, the numbers are their means, and ± is half their difference. The runs are those of [Recipes compared](recipes.md), whose",
        "command writes this page too.\n",
    ]
    for model in [name for name in PRETRAINED if select(found, model=name)]:
        parts.append(f"## {model}\n")
        parts.append(f"{MODELS[model].tokens:,} training tokens, {MODELS[model].held_out:,} held-out tokens.\n")
        parts.append(f"![KL of every layer of {model}, for each recipe](recipes-{model}.png)\n")
        for text in texts_of(select(found, model=model)):
            parts += _layers_of(text, select(found, model=model, text=text))
        for entry in select(found, model=model, variant=ALL):
            parts += _every_layer(entry)
    if planned.RESULTS.exists():
        parts += planned.lines()
    return "\n".join(parts).rstrip() + "\n"


def _layers_of(text: str, entries: list[Entry]) -> Iterator[str]:
    entries = [entry for entry in entries if entry["case"]["variant"] in ("", FULL, LONG)]
    yield f"### {text}\n"
    yield "| recipe | mean KL | " + " | ".join(f"layer {i}" for i in entries[0]["layers"]) + " |"
    yield "|---|---:|" + "---:|" * len(entries[0]["layers"])
    for line in LINES:
        for variant in ("", FULL, LONG):
            of_line = select(entries, line=line, variant=variant)
            if of_line:
                tokens = of_line[0]["case"]["tokens"]
                name = line + {"": "", FULL: ", full vocabulary", LONG: f", {tokens:,} tokens"}[variant]
                columns = [np.mean([entry[name] for entry in of_line], axis=0) for name in ("kl", "top1", "bias")]
                cells = [f"{kl:.3f} ({top1:.0%}, {bias:.2f})" for kl, top1, bias in zip(*columns, strict=True)]
                yield "| " + " | ".join([name, _mean_cell(of_line), *cells]) + " |"
    yield ""


def _every_layer(entry: Entry) -> Iterator[str]:
    """Yield the table of a run of all layers, in rows of six."""
    yield f"### {entry['case']['text']}, `{entry['case']['line']}` on all layers\n"
    yield f"Mean KL {mean(entry['kl']):.4f}.\n"
    yield "| layers |" + " |" * 6
    yield "|---|" + "---:|" * 6
    cells = [f"{kl:.3f} ({top1:.0%}, {bias:.2f})" for kl, top1, bias in zip(entry["kl"], entry["top1"], entry["bias"], strict=True)]
    for start in range(0, len(cells), 6):
        row = cells[start : start + 6]
        yield f"| {entry['layers'][start]} to {entry['layers'][start + len(row) - 1]} | " + " | ".join([*row, *[""] * (6 - len(row))]) + " |"
    yield ""


def _listed(layers: Sequence[int]) -> str:
    """Return layer numbers in words."""
    whole = list(layers) == list(range(len(layers)))
    return f"all, {layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
