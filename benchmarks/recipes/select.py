"""Select runs of the comparison, and reduce them to numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from benchmarks.recipes.cases import FEW, MODELS, RECIPES, TEXTS, cases

Entry = dict[str, Any]
LINES = ("logit lens", *RECIPES)
PRETRAINED = ("smollm2", "gemma3-270m")
LEAST = 1e-6  # nats: the last layer is exact, and has no ratios


def key(entry: Entry) -> tuple[Any, ...]:
    """Return what names a run: a newer result with another budget or other settings replaces it."""
    return tuple(entry["case"][name] for name in ("model", "text", "seed", "line", "variant"))


def current(found: Sequence[Entry]) -> list[Entry]:
    """Return the entries whose case is one of today's: runs with a former budget do not compare."""
    wanted = {model.name: [case.to_dict() for case in cases(model)] for model in MODELS.values()}
    return [entry for entry in found if entry["case"] in wanted.get(entry["case"]["model"], [])]


def select(found: Sequence[Entry], **wanted: Any) -> list[Entry]:
    """Return the entries whose case has the wanted values."""
    return [entry for entry in found if all(entry["case"][name] == value for name, value in wanted.items())]


def same(found: Sequence[Entry], entry: Entry, **other: Any) -> Entry | None:
    """Return the run that differs from `entry` in the given values only; None if there is none."""
    wanted = {name: entry["case"][name] for name in ("model", "text", "seed", "line", "variant")} | other
    return next(iter(select(found, **wanted)), None)


def sampled_partner(found: Sequence[Entry], entry: Entry) -> Entry | None:
    """Return the run with a sampled vocabulary that has the tokens and layers of one with the full vocabulary; None if there is none."""
    return same(found, entry, variant="" if MODELS[entry["case"]["model"]].few is None else FEW)


def models_of(found: Sequence[Entry]) -> list[str]:
    """Return the models that have results, in the order of MODELS."""
    return [name for name in MODELS if select(found, model=name)]


def texts_of(found: Sequence[Entry]) -> list[str]:
    """Return the texts that have results, in the order of TEXTS."""
    return [name for name in TEXTS if select(found, text=name)]


def mean(values: Sequence[float]) -> float:
    """Return the mean: of an entry's layers, or of runs."""
    return float(np.mean(values))


def with_spread(values: Sequence[float], digits: int = 4) -> str:
    """Return the mean of runs that differ in their seed, with half their range if there are several."""
    spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def with_range(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean of ratios, with the smallest and the largest if there are several."""
    extent = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{extent}"


def layer_ratios(ours: Entry, theirs: Entry) -> dict[int, float]:
    """Return {layer: KL of our run divided by that of theirs}, without layers that are exact."""
    columns = zip(ours["layers"], ours["kl"], theirs["kl"], strict=True)
    return {layer: our_kl / their_kl for layer, our_kl, their_kl in columns if their_kl > LEAST}


def mean_ratios(found: Sequence[Entry], line: str, other: str) -> list[float]:
    """Return the ratios of the mean KL of a line to that of another line, one for each text and seed that both have."""
    pairs = [(entry, same(found, entry, line=other)) for entry in select(found, line=line, variant="")]
    return [mean(ours["kl"]) / mean(theirs["kl"]) for ours, theirs in pairs if theirs is not None]
