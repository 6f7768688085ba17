"""What the comparison was to show, and whether it does."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.recipes.cases import EIGHTH, FULL, LONG, MODELS, RECIPES, SEEDS, TEXTS
from benchmarks.recipes.select import Entry, layer_ratios, mean, models_of, same, select, texts_of, with_spread
from benchmarks.targets import Target

WITHIN = 0.01  # what a sampled vocabulary may cost
PART = 8  # of paper's tokens
# {model: what was tried where an eighth of paper's tokens is not enough}
TRIED = {
    "demo": "Tried with as many tokens: warm starts of 4,096 to 16,896 tokens with a rate of 0.12, and 6,144 with 0.1, which was the best (0.7584)."
}


def targets(found: Sequence[Entry]) -> list[Target]:
    """Return the targets whose runs have been made."""
    found_targets = [never_above_ridge(found)]
    for model in models_of(found):
        of_model = select(found, model=model)
        found_targets += [below_every_other(model, of_model), with_an_eighth(model, of_model), sampled_beside_full(model, of_model)]
    return [target for target in found_targets if target is not None]


def never_above_ridge(found: Sequence[Entry]) -> Target | None:
    """Compare each layer of `fast` with the closed form of the same model, text and seed."""
    worst: tuple[float, str] | None = None
    models: list[str] = []
    for entry in select(found, line="fast", variant=""):
        ridge = same(found, entry, line="ridge")
        if ridge is None:
            continue
        models.append(entry["case"]["model"])
        layer, ratio = max(layer_ratios(entry, ridge).items(), key=lambda item: item[1])
        case = entry["case"]
        if worst is None or ratio > worst[0]:
            worst = ratio, f"layer {layer} of {case['model']} on `{case['text']}`"
    if worst is None:
        return None
    wanted = len(MODELS) * len(TEXTS) * len(SEEDS)
    runs = f"in {len(models)} runs of {wanted}, on {', '.join(dict.fromkeys(models))}"
    measured = f"{runs}, at most {worst[0]:.2f} of the closed form's KL ({worst[1]})"
    return Target("`fast` ends above `ridge` at no layer of any model", measured, worst[0] <= 1)


def below_every_other(model: str, found: Sequence[Entry]) -> Target | None:
    """Compare the mean KL of `fast` with the best of the other recipes, text by text."""
    parts, ratios = [], []
    for text in texts_of(found):
        others = {line: select(found, line=line, variant="", text=text) for line in RECIPES}
        means = {line: mean([mean(entry["kl"]) for entry in entries]) for line, entries in others.items() if entries}
        ours = means.pop("fast", None)
        if ours is None or len(means) < 2:
            continue
        best = min(means, key=lambda line: means[line])
        ratios.append(ours / means[best])
        missing = ", ".join(f"`{line}`" for line, entries in others.items() if not entries)
        parts.append(f"{ratios[-1]:.3f} of `{best}`'s on `{text}`" + (f" (not run: {missing})" if missing else ""))
    if not ratios:
        return None
    bound = (
        "The fixed steps of version 0.1.0 were tuned for this model and diverge on others. Today's have one constant for all models."
        if all("0.1.0" in part for part, ratio in zip(parts, ratios, strict=True) if ratio >= 1)
        else ""
    )
    return Target(f"{model}: with equal tokens `fast` ends below every other recipe", "; ".join(parts), max(ratios) < 1, bound)


def with_an_eighth(model: str, found: Sequence[Entry]) -> Target | None:
    """Compare `fast` with `paper` after its whole budget."""
    papers = select(found, line="paper", variant=LONG)
    if not papers:
        return None
    paper = papers[0]
    most = paper["case"]["tokens"] // PART
    # The longest runs that are short enough: those of EIGHTH, or the runs of the table, if they already need fewer tokens.
    for variant in (EIGHTH, ""):
        runs = [e for e in select(found, line="fast", variant=variant, text=paper["case"]["text"]) if e["case"]["tokens"] <= most]
        if runs:
            break
    else:
        return None
    ours, theirs = [mean(entry["kl"]) for entry in runs], mean(paper["kl"])
    tokens = runs[0]["case"]["tokens"]
    measured = (
        f"{with_spread(ours)} nats with {tokens:,} tokens, paper's {theirs:.4f} with {paper['case']['tokens']:,} ({mean(ours) / theirs - 1:+.2%})"
    )
    return Target(
        f"{model}: `fast` reaches paper's final KL with at most an eighth of its tokens", measured, mean(ours) <= theirs, TRIED.get(model, "")
    )


def sampled_beside_full(model: str, found: Sequence[Entry]) -> Target | None:
    """Compare `fast` with a sampled vocabulary with `fast` with the full one."""
    pairs = [(same(found, full, variant=""), full) for full in select(found, line="fast", variant=FULL)]
    ratios = [mean(ours["kl"]) / mean(full["kl"]) - 1 for ours, full in pairs if ours is not None]

    if not ratios:
        return None
    wanted = f"{model}: with equal tokens a sampled vocabulary ends within {WITHIN:.0%} of the full one's KL"
    return Target(wanted, f"{max(ratios):+.2%}", max(ratios) <= WITHIN)
