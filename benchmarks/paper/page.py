"""docs/paper.md, written from the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.paper.claims import CLAIMS, Claim, Verdict
from benchmarks.paper.experiments import EXPERIMENTS, cases
from benchmarks.paper.subjects import LENGTH, MODELS

Entry = dict[str, Any]
WORDS = {True: "holds", False: "does not hold"}


def select(found: Sequence[Entry], **wanted: Any) -> list[Entry]:
    """Return the results whose case has the wanted values, in the order of the seeds."""
    return sorted((e for e in found if all(e["case"][k] == v for k, v in wanted.items())), key=lambda e: e["case"]["seed"])


def verdicts(found: Sequence[Entry], claim: Claim) -> dict[str, tuple[Verdict, list[int]]]:
    """Return {model: (verdict, seeds)} of a claim, for the models that have results."""
    judged = {}
    for model in EXPERIMENTS[claim.experiment].models:
        entries = select(found, experiment=claim.experiment, model=model)
        if entries:
            judged[model] = (claim.judge([entry["result"] for entry in entries]), [entry["case"]["seed"] for entry in entries])
    return judged


def paper(found: Sequence[Entry]) -> str:
    """Return the page."""
    return "\n".join(_lines(found)).rstrip() + "\n"


def _lines(found: Sequence[Entry]) -> Iterator[str]:
    yield "# The paper's experiments, here\n"
    yield (
        "`python -m benchmarks.paper` runs the experiments of [Belrose et al. 2023](https://arxiv.org/abs/2303.08112) on small models, on a CPU,\n"
        "and writes this page. It asks of each claim whether it holds there. Every verdict is computed from `benchmarks/results/paper.json`,\n"
        "by the rule that is beside it. The paper's models are up to a hundred times larger, and their lenses saw thousands of times more\n"
        "tokens. So a claim that does not hold here is not refuted. What this page says of the paper is a reading of its text and figures: look\n"
        "there before you cite it.\n"
    )
    yield "| model | layers, width | training tokens of the lens | held-out tokens | seeds |"
    yield "|---|---|---:|---:|---|"
    for name, budget in MODELS.items():
        yield f"| {name} | {SIZES[name]} | {budget.tokens:,} | {budget.held_out:,} | {', '.join(map(str, budget.seeds))} |"
    yield ""
    yield (
        f"Lenses are of the recipe `fast` with a sampled vocabulary, on the bundled text, in sequences of {LENGTH} tokens. `tiny` is trained by\n"
        "the command itself, with checkpoints. A seed is that of the lens's training, for `tiny` also of the model's. Brackets are 95 %\n"
        "bootstrap intervals. Layer i is the output of block i.\n"
    )
    yield from _summary(found)
    for claim in CLAIMS:
        yield from _section(claim, verdicts(found, claim))
    yield from _left_out(found)


SIZES = {"smollm2": "30, 576", "demo": "8, 256", "small": "6, 128", "gemma3-270m": "18, 640", "tiny": "4, 64"}


def _summary(found: Sequence[Entry]) -> Iterator[str]:
    judged = {claim.title: verdicts(found, claim) for claim in CLAIMS}
    all_of_them = [verdict.holds for each in judged.values() for verdict, _ in each.values()]
    yield "## Overview\n"
    yield f"{sum(all_of_them)} of {len(all_of_them)} verdicts are that the claim holds.\n"
    yield "| claim | " + " | ".join(MODELS) + " |"
    yield "|---|" + "---|" * len(MODELS)
    for title, each in judged.items():
        cells = [WORDS[each[name][0].holds] if name in each else "" for name in MODELS]
        yield f"| [{title}](#{_anchor(title)}) | " + " | ".join(cells) + " |"
    yield ""
    yield "![Cross-entropy, bias and the effect of deleted blocks by layer](paper.png)\n"


def _anchor(title: str) -> str:
    return "-".join("".join(letter for letter in title.lower() if letter.isalnum() or letter in " -").split())


def _section(claim: Claim, judged: dict[str, tuple[Verdict, list[int]]]) -> Iterator[str]:
    yield f"## {claim.title}\n"
    yield f"- The paper: {claim.paper}"
    yield f"- Here it holds if {claim.rule}\n"
    if not judged:
        yield "Not run.\n"
        return
    yield "| model | figure | verdict |"
    yield "|---|---|---|"
    for model, (verdict, seeds) in judged.items():
        yield f"| {model}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))} | {verdict.figure} | **{WORDS[verdict.holds]}** |"
    yield ""


def _left_out(found: Sequence[Entry]) -> Iterator[str]:
    every = cases(list(MODELS), list(EXPERIMENTS))
    missing: dict[str, list[str]] = {}
    for case in every:
        if not any(entry["case"] == case for entry in found):
            missing.setdefault(f"{case['model']}, seed {case['seed']}", []).append(f"`{case['experiment']}`")
    hours = sum(entry["core_seconds"] for entry in found) / 3600
    yield "## What was run\n"
    yield f"{len(every) - sum(map(len, missing.values()))} of {len(every)} runs, {hours:.1f} core hours without the training of the lenses.\n"
    yield from (f"- Not run on {where}: {', '.join(names)}." for where, names in missing.items())
