"""The experiments by name: what each measures, on which models, and with which seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.paper.subjects import MODELS, TINY, Budget, Subject


@dataclass(frozen=True)
class Experiment:
    """An experiment of the paper.

    Attributes:
        name: name of the experiment.
        function: 'module:function' of benchmarks.paper, which returns the result as JSON values.
        models: names of the models that it is run on.
        seeds: the most seeds.
    """

    name: str
    function: str
    models: tuple[str, ...]
    seeds: int = 2

    def run(self, subject: Subject) -> dict[str, Any]:
        """Run the experiment."""
        from importlib import import_module

        module, _, name = self.function.partition(":")
        function: Callable[[Subject], dict[str, Any]] = getattr(import_module(f"benchmarks.paper.{module}"), name)
        return function(subject)


EVERY = tuple(name for name in MODELS if name != TINY)
EXPERIMENTS = {
    each.name: each
    for each in (
        Experiment("perplexity", "layers:perplexity", EVERY),
        Experiment("bias", "layers:bias", EVERY),
        Experiment("transfer", "layers:transfer", EVERY),
        Experiment("alignment", "causes:alignment", EVERY, seeds=1),
        Experiment("deletion", "causes:deletion", EVERY, seeds=1),
        Experiment("gradient", "causes:gradient", EVERY, seeds=1),
        Experiment("difficulty", "predictions:difficulty", (TINY,)),
        Experiment("false_demonstrations", "predictions:false_demonstrations", EVERY, seeds=1),
        Experiment("injection", "predictions:injection", EVERY),
        Experiment("weights", "predictions:weights", EVERY, seeds=1),
        Experiment("fidelity", "causes:fidelity", EVERY, seeds=1),
    )
}


def case(experiment: Experiment, budget: Budget, seed: int) -> dict[str, Any]:
    """Return what names a run, as JSON holds it: two equal dictionaries are the same run."""
    settings = {name: value for name, value in asdict(budget).items() if name not in ("name", "source", "seeds")}
    return {"experiment": experiment.name, "model": budget.name, "seed": seed, **settings}


def cases(models: list[str], experiments: list[str]) -> list[dict[str, Any]]:
    """Return the runs of some models and experiments, those of one model and seed together, first seeds first."""
    return [
        case(EXPERIMENTS[experiment], MODELS[model], seed)
        for model in models
        for seed in MODELS[model].seeds
        for experiment in experiments
        if model in EXPERIMENTS[experiment].models and MODELS[model].seeds.index(seed) < EXPERIMENTS[experiment].seeds
    ]
