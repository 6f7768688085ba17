"""What the comparison was to show, and whether it does."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.recipes.cases import EIGHTH, FEW, FULL, LONG, MODELS, RECIPES, SEEDS, TEXTS
from benchmarks.recipes.select import Entry, layer_ratios, mean, models_of, same, sampled_partner, select, texts_of, with_spread
from benchmarks.targets import Target

WITHIN = 0.01  # what a sampled vocabulary may cost
PART = 8  # of paper's tokens
FORMER = "fast 0.1.0"
# Why a layer of `fast` may end above the closed form.
RIDGE_BOUND = (
    "`ridge` has all tokens of the run for its closed form, where `fast` has at most half of them. The guard compares a layer with its own closed "
    "form, on few tokens that are held back, which cannot tell differences below about a hundredth."
)
# Why `fast` may end above its own former settings.
FORMER_BOUND = (
    "The fixed steps of version 0.1.0 were tuned for the bundled models and diverge on others. Today's have one constant for all models. Tried "
    "on the demo model with 43,008 tokens of both texts: rates of 0.08 to 0.3, decays of 0 to 0.15, momentum 0.9, step lengths from smoothed "
    "losses and slopes or from the momentum's own slope, other exponents of the scale of hidden states, other lengths for the bias. On `code` a "
    "rate of 0.2 ends 1% lower and momentum 0.9 1.4% lower; on `help` they end 1.4% and 2.2% higher. Tokens that are shuffled among steps took it "
    "from 1.5% above to level on `code`. Then a decay of 0.04 in place of 0.03 ends 0.2% lower there, and no guard 0.3% lower."
)
# Why an eighth of paper's tokens may not be enough.
EIGHTH_BOUND = (
    "The seed decides which part of the text a short run sees; paper's long run sees all of it, more than once. Tried on `small` with both "
    "seeds: rates of 0.06 to 0.12, decays of 0.02 and 0.04, momentum 0.9, and no guard end with 0.6523 to 0.6549 nats on average. Tried with "
    "43,008 tokens: rates that fall with the power 0.7 or 1.5 of the steps left, or only after the first third, end 0.2 to 0.5% higher; rows or "
    "columns of the direction scaled to equal length equal to 0.05%; coordinates of the fourth root of the hidden states' covariance 0.1% "
    "lower (demo 0.2% lower, SmolLM2 0.6% higher)."
)


def targets(found: Sequence[Entry]) -> list[Target]:
    """Return the targets whose runs have been made."""
    found_targets = [never_above_ridge(found)]
    for model in models_of(found):
        of_model = select(found, model=model)
        found_targets += [below_every_other(model, of_model), below_its_former(model, of_model)]
        found_targets += [with_an_eighth(model, of_model), sampled_beside_full(model, of_model)]
    return [target for target in found_targets if target is not None]


def never_above_ridge(found: Sequence[Entry]) -> Target | None:
    """Compare each layer of `fast` with the closed form of the same model, text and seed."""
    worst: tuple[float, str] | None = None
    models: list[str] = []
    ratios: list[float] = []
    for entry in select(found, line="fast", variant=""):
        ridge = same(found, entry, line="ridge")
        if ridge is None:
            continue
        models.append(entry["case"]["model"])
        of_layers = layer_ratios(entry, ridge)
        ratios += of_layers.values()
        layer, ratio = max(of_layers.items(), key=lambda item: item[1])
        case = entry["case"]
        if worst is None or ratio > worst[0]:
            worst = ratio, f"layer {layer} of {case['model']} on `{case['text']}`"
    if worst is None:
        return None
    wanted = len(MODELS) * len(TEXTS) * len(SEEDS)
    runs = f"in {len(models)} runs of {wanted}, on {', '.join(dict.fromkeys(models))}"
    measured = f"{runs}, at most {worst[0]:.2f} of the closed form's KL ({worst[1]})"
    above = sum(ratio > 1 for ratio in ratios)
    if above:
        measured += f"; above it at {above} of {len(ratios)} layers"
    return Target("`fast` ends above `ridge` at no layer of any model", measured, worst[0] <= 1, RIDGE_BOUND)


def below_every_other(model: str, found: Sequence[Entry]) -> Target | None:
    """Compare the mean KL of `fast` with the best of the other recipes, text by text."""
    parts, ratios = [], []
    for text in texts_of(found):
        others = {line: select(found, line=line, variant="", text=text) for line in RECIPES if line != FORMER}
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
    return Target(f"{model}: with equal tokens `fast` ends below every other recipe", "; ".join(parts), max(ratios) < 1)


def below_its_former(model: str, found: Sequence[Entry]) -> Target | None:
    """Compare the mean KL of `fast` with that of its former settings, text by text."""
    parts, ratios = [], []
    for text in texts_of(found):
        pairs = [(mean(ours["kl"]), same(found, ours, line=FORMER)) for ours in select(found, line="fast", variant="", text=text)]
        each = [ours / mean(theirs["kl"]) for ours, theirs in pairs if theirs is not None]
        if each:
            ratios.append(mean(each))
            parts.append(f"{ratios[-1]:.3f} of it on `{text}`")
    if not ratios:
        return None
    return Target(f"{model}: `fast` ends below what its settings of version 0.1.0 end with", "; ".join(parts), max(ratios) < 1, FORMER_BOUND)


def with_an_eighth(model: str, found: Sequence[Entry]) -> Target | None:
    """Compare `fast` with `paper` after its whole budget."""
    papers = select(found, line="paper", variant=LONG)
    if not papers:
        return None
    paper = papers[0]
    most = paper["case"]["tokens"] // PART
    of_fast = [e for e in select(found, line="fast", text=paper["case"]["text"]) if e["layers"] == paper["layers"] and e["case"]["tokens"] <= most]
    # The longest runs that are short enough: those of EIGHTH, or shorter ones, if these already need fewer tokens.
    runs = next((runs for variant in (EIGHTH, FEW, "") if (runs := select(of_fast, variant=variant))), None)
    if runs is None:
        return None
    ours, theirs = ([mean(entry["kl"]) for entry in each] for each in (runs, papers))
    tokens = runs[0]["case"]["tokens"]
    measured = (
        f"{with_spread(ours)} nats with {tokens:,} tokens, paper's {with_spread(theirs)} with {paper['case']['tokens']:,} "
        f"({mean(ours) / mean(theirs) - 1:+.2%})"
    )
    return Target(
        f"{model}: `fast` reaches paper's final KL with at most an eighth of its tokens", measured, mean(ours) <= mean(theirs), EIGHTH_BOUND
    )


def sampled_beside_full(model: str, found: Sequence[Entry]) -> Target | None:
    """Compare `fast` with a sampled vocabulary with `fast` with the full one."""
    pairs = [(sampled_partner(found, full), full) for full in select(found, line="fast", variant=FULL)]
    ratios = [mean(ours["kl"]) / mean(full["kl"]) - 1 for ours, full in pairs if ours is not None]
    if not ratios:
        return None
    wanted = f"{model}: with equal tokens a sampled vocabulary ends within {WITHIN:.0%} of the full one's KL"
    return Target(wanted, f"{max(ratios):+.2%}", max(ratios) <= WITHIN)
