"""Which visits a model needs: the cheapest run that reaches the mark, and what stands beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.competitor import TORCH_BF16
from benchmarks.recipes.cases import LONG, LONG_TOKENS, MODELS
from benchmarks.recipes.select import PRETRAINED, Entry, mean, select
from benchmarks.time_to_quality.visits import COMPETITORS, FORMERS, LEFT_OUT, STEP_COST, TEXT, Measured, Visit

FORMER = "fast 0.1.0"
OURS = ("ridge", "fast")
# What tuned-lens does: it runs the lens under autocast to bfloat16 on every device.
UPSTREAM = TORCH_BF16
GRID_UNIT = 512  # budgets are multiples of it
CLOSE = 1.2  # the search ends when the largest budget that fails and the smallest that reaches the mark are so close
BUNDLED_BUDGETS, PRETRAINED_BUDGETS = (43_008, 51_200, 61_440, 81_920), (1_536, 3_072, 6_144, 12_288, 24_576)
SLOW_RUN = 120.0  # core seconds: a longer run is measured once


class Results:
    """The file of results: {"machine": ..., "models": {model: {key of a visit: Measured}}}."""

    def __init__(self, path: Path) -> None:
        self._path = path
        content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.machine: dict[str, Any] = content.get("machine", {})
        models: dict[str, dict[str, Any]] = content.get("models", {})
        self.models = {model: {key: Measured(**value) for key, value in visits.items()} for model, visits in models.items()}

    def get(self, wanted: Visit) -> Measured | None:
        """Return what visits have found; None before the first."""
        return self.models.get(wanted.model, {}).get(wanted.key)

    def add(self, wanted: Visit, found: Measured) -> Measured:
        """Add a visit, save the file, and return what all visits have found."""
        known = self.models.setdefault(wanted.model, {}).setdefault(wanted.key, Measured())
        known.add(found)
        models = {model: {key: asdict(value) for key, value in visits.items()} for model, visits in self.models.items()}
        self._path.write_text(json.dumps({"machine": self.machine, "models": models}, indent=1) + "\n")
        return known


def runs_of(results: Results, model: str, name: str, vocabulary: str = "sampled") -> dict[int, Measured]:
    """Return {tokens: what was found} of the runs of a recipe, by tokens."""
    found = {}
    for key, value in results.models.get(model, {}).items():
        if value.kl and (tokens := _tokens_of(key)) and key == Visit(model, name, tokens, vocabulary).key:
            found[tokens] = value
    return dict(sorted(found.items()))


def _tokens_of(key: str) -> int:
    words = key.removesuffix(" tokens").rpartition(" ")[2]
    return int(words) if key.endswith(" tokens") and words.isdigit() else 0


def mark_of(model: str, comparison: Sequence[Entry]) -> float | None:
    """Return the KL that `paper` ends with after its whole budget, from the comparison of recipes; None before that was run."""
    papers = select(comparison, model=model, line="paper", variant=LONG, text=TEXT)
    return mean(papers[0]["kl"]) if papers else None


def cheapest(runs: Sequence[tuple[Visit, Measured]], mark: float) -> tuple[Visit, Measured] | None:
    """Return the run with the fewest core seconds among those whose KL is at most the mark; None if there is none."""
    good = [run for run in runs if mean(run[1].kl) <= mark]
    return min(good, key=lambda run: run[1].seconds) if good else None


def ours(results: Results, model: str, mark: float) -> tuple[Visit, Measured] | None:
    """Return metalens's cheapest run that reaches the mark."""
    runs = [(Visit(model, name, tokens), found) for name in OURS for tokens, found in runs_of(results, model, name).items()]
    return cheapest(runs, mark)


def former(results: Results, model: str, mark: float, name: str = FORMER) -> tuple[Visit, Measured] | None:
    """Return the cheapest run of version 0.1.0, which had the full vocabulary, that reaches the mark.

    Args:
        results: the results.
        model: name of the model.
        mark: the KL to reach.
        name: FORMER, its settings on today's kernels, or one of FORMERS, itself.
    """
    runs = runs_of(results, model, name, "full").items()
    return cheapest([(Visit(model, name, tokens, "full"), found) for tokens, found in runs], mark)


def smallest_budget(reaches: Callable[[int], bool], budgets: Sequence[int]) -> int | None:
    """Return the smallest budget that reaches the mark, to the factor CLOSE: along a grid, then by bisection. None if no budget of the grid does.

    Args:
        reaches: function of a budget. It is called for few budgets, small ones first.
        budgets: the grid, rising.
    """
    fails = 0
    for budget in budgets:
        if reaches(budget):
            reached = budget
            break
        fails = budget
    else:
        return None
    while fails and reached / fails > CLOSE:
        middle = round(math.sqrt(fails * reached) / GRID_UNIT) * GRID_UNIT
        if not fails < middle < reached:
            break
        if reaches(middle):
            reached = middle
        else:
            fails = middle
    return reached


def explore(model: str, mark: float, measure: Callable[[Visit], Measured], with_former: bool = False) -> None:
    """Make the runs of the search and of the curves.

    Args:
        model: name of the model.
        mark: the KL to reach.
        measure: function that returns what is known of a visit, and makes the visit if nothing is.
        with_former: also search for the budgets of FORMERS, version 0.1.0 itself.
    """
    # A recipe that diverges on a model never reaches the mark. So no run on a pretrained model is longer than those of the comparison of recipes.
    budgets = [tokens for tokens in PRETRAINED_BUDGETS if tokens <= MODELS[model].tokens] if model in PRETRAINED else BUNDLED_BUDGETS
    formers = (FORMER, *FORMERS) if with_former else (FORMER,)
    for name, vocabulary in (*((name, "sampled") for name in OURS), *((name, "full") for name in formers)):
        smallest_budget(lambda tokens, name=name, vocabulary=vocabulary: mean(measure(Visit(model, name, tokens, vocabulary)).kl) <= mark, budgets)
    equal_time(model, measure)


def equal_time(model: str, measure: Callable[[Visit], Measured]) -> tuple[Visit, Visit]:
    """Make a run of `fast` with the full vocabulary, and one with a sampled vocabulary that takes as many core seconds; return both."""
    full, short = (Visit(model, "fast", MODELS[model].tokens, vocabulary) for vocabulary in ("full", "sampled"))
    tokens = math.floor(full.tokens * measure(full).seconds / measure(short).seconds / GRID_UNIT) * GRID_UNIT
    sampled = Visit(model, "fast", tokens)
    measure(sampled)
    return full, sampled


def headline(results: Results, model: str, mark: float) -> Iterator[Visit]:
    """Yield the visits to repeat in turn: the cheapest runs that reach the mark, and steps of the competitors."""
    for run in (ours(results, model, mark), *(former(results, model, mark, name) for name in (FORMER, *FORMERS))):
        if run is not None and run[1].seconds < SLOW_RUN:
            yield run[0]
    for name in (*COMPETITORS, STEP_COST):
        if (model, name) not in LEFT_OUT:
            yield Visit(model, name)


def paper_seconds(results: Results, model: str, competitor: str = UPSTREAM, tokens: int = LONG_TOKENS) -> float | None:
    """Return the core seconds of the recipe `paper` in a competitor: its measured core seconds of a token, times tokens."""
    steps = results.get(Visit(model, competitor))
    return None if steps is None else steps.seconds * tokens
