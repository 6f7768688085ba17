"""The pages about the comparison, written from its results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from benchmarks import planned
from benchmarks.recipes.cases import EIGHTH, FEW, FULL, LENGTH, LONG, LONG_TOKENS, MODELS, RECIPES, TEXTS
from benchmarks.recipes.select import (
    LINES,
    PRETRAINED,
    Entry,
    layer_ratios,
    mean,
    mean_ratios,
    models_of,
    same,
    sampled_partner,
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
    layers = next(iter(select(entries, variant="") or entries))["layers"]
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
    """Yield sentences about the runs with the full vocabulary, and about the long ones."""
    for whole in select(entries, variant=FULL):
        sampled = sampled_partner(entries, whole)
        if sampled:
            line, ours, theirs = whole["case"]["line"], mean(sampled["kl"]), mean(whole["kl"])
            text = f"With equal tokens `{line}` reaches {theirs:.4f} on `{whole['case']['text']}`{_of_layers(whole)} with the full vocabulary"
            yield f"{text}, and {ours:.4f} with the sampled one ({ours / theirs - 1:+.2%}).\n"
    for variant in (EIGHTH, LONG):
        for line in RECIPES:
            if longer := select(entries, variant=variant, line=line):
                tokens, reached = longer[0]["case"]["tokens"], with_spread([mean(entry["kl"]) for entry in longer])
                yield f"After {tokens:,} tokens, `{line}` reaches {reached} on `{longer[0]['case']['text']}`{_of_layers(longer[0])}.\n"


def _of_layers(entry: Entry) -> str:
    """Return which layers a run has, if its model has more."""
    return "" if MODELS[entry["case"]["model"]].few is None else f" (layers {_listed(entry['layers'])})"


# ---------------------------------------------------------------------- docs/real-models.md


def real_models(found: Sequence[Entry]) -> str:
    """Return docs/real-models.md: every layer of the pretrained models, and what `plan` expected."""
    parts = [
        "# Recipes on pretrained models\n",
        "For each layer: KL(model || lens) in nats per token on held-out text. The second table of a text has some layers, with the share of",
        "tokens whose most likely next token is the model's, and the bias (KL of the mean predictions, nats). The third has the runs that train",
        f"these layers alone. Sequences have {LENGTH} tokens. Where two seeds have been run, the numbers are their means, and ± is half their",
        "difference. The runs are those of [Recipes compared](recipes.md), whose command writes this page too.\n",
    ]
    for model in [name for name in PRETRAINED if select(found, model=name)]:
        parts.append(f"## {model}\n")
        parts.append(f"{MODELS[model].tokens:,} training tokens, {MODELS[model].held_out:,} held-out tokens.\n")
        parts.append(f"![KL of every layer of {model}, for each recipe](recipes-{model}.png)\n")
        for text in texts_of(select(found, model=model)):
            parts += _layers_of(model, text, select(found, model=model, text=text))
    if planned.RESULTS.exists():
        parts += planned.lines()
    return "\n".join(parts).rstrip() + "\n"


def _layers_of(model: str, text: str, entries: list[Entry]) -> Iterator[str]:
    """Yield the tables of a text: all layers, some of them in detail, and the runs that train these alone."""
    yield f"### {text}\n"
    of_all, alone = select(entries, variant=""), [entry for entry in entries if entry["case"]["variant"] in (FEW, FULL, LONG)]
    if of_all:
        layers = of_all[0]["layers"]
        yield from _every_layer(of_all)
        yield from _details(of_all, MODELS[model].layers(len(layers)) or layers)
    if alone:
        yield from _details(alone, alone[0]["layers"])


def _by_name(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Return {name of a row or column: its runs, one for each seed}."""
    found = {}
    for line in LINES:
        for variant, name in (("", ""), (FEW, ""), (FULL, ", full vocabulary"), (LONG, f", {LONG_TOKENS:,} tokens")):
            if runs := select(entries, line=line, variant=variant):
                found[line + name] = runs
    return found


def _every_layer(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield the table of KL, a row for each layer and a column for each recipe."""
    columns = _by_name(entries)
    yield "| layer | " + " | ".join(columns) + " |"
    yield "|---:|" + "---:|" * len(columns)
    kl = [np.mean([entry["kl"] for entry in runs], axis=0) for runs in columns.values()]
    for layer, *values in zip(entries[0]["layers"], *kl, strict=True):
        yield f"| {layer} | " + " | ".join(f"{value:.3f}" for value in values) + " |"
    yield "| mean | " + " | ".join(map(_mean_cell, columns.values())) + " |"
    yield ""


def _details(entries: Sequence[Entry], layers: Sequence[int]) -> Iterator[str]:
    """Yield the table of KL, agreement and bias of some layers, a row for each recipe. The mean is that of the layers shown."""
    yield "| recipe | mean KL | " + " | ".join(f"layer {layer}" for layer in layers) + " |"
    yield "|---|---:|" + "---:|" * len(layers)
    for name, runs in _by_name(entries).items():
        shown = [runs[0]["layers"].index(layer) for layer in layers]
        kl, top1, bias = (np.mean([entry[score] for entry in runs], axis=0)[shown] for score in ("kl", "top1", "bias"))
        cells = [f"{k:.3f} ({t:.0%}, {b:.2f})" for k, t, b in zip(kl, top1, bias, strict=True)]
        yield "| " + " | ".join([name, f"{kl.mean():.4f}", *cells]) + " |"
    yield ""


def _listed(layers: Sequence[int]) -> str:
    """Return layer numbers in words."""
    whole = list(layers) == list(range(len(layers)))
    return f"all, {layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
