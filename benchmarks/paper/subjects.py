"""The models of the reproduction, with their budgets, and the lens that each experiment reads them with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx

import metalens
from metalens import InterpretableModel, TunedLens
from metalens.evaluation.text import Sequences
from metalens.models import bundled

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "paper"  # lenses and checkpoints, which a second run finds again
LENGTH = 128  # tokens of a sequence
TINY = "tiny"  # the model that checkpoints.py trains


@dataclass(frozen=True)
class Budget:
    """What the experiments may take on a model.

    Attributes:
        name: name of the model on the page.
        source: its folder, or a name that `metalens.load` knows; "" = trained here.
        tokens: training tokens of the lens.
        held_out: tokens that the lens is read on.
        layers: the most layers of the experiments whose cost grows with them.
        exchanged: the most layers whose translators read each other's hidden states.
        directions: directions of a causal basis.
        seeds: seeds of the lens's training.
    """

    name: str
    source: str
    tokens: int
    held_out: int
    layers: int
    exchanged: int
    directions: int
    seeds: tuple[int, ...] = (0, 1)


MODELS = {
    budget.name: budget
    for budget in (
        Budget("smollm2", "smollm2", tokens=3_072, held_out=512, layers=5, exchanged=5, directions=8),
        Budget("demo", str(bundled.MODEL), tokens=12_288, held_out=1_024, layers=5, exchanged=7, directions=10),
        Budget("small", str(ROOT / "tools" / "demo_models" / "small"), tokens=20_480, held_out=2_048, layers=5, exchanged=5, directions=10),
        Budget("gemma3-270m", "gemma3-270m", tokens=1_536, held_out=256, layers=3, exchanged=4, directions=6, seeds=(0,)),
        Budget(TINY, "", tokens=8_192, held_out=1_024, layers=4, exchanged=3, directions=10),
    )
}


class Subject:
    """A model with a lens and a held-out text.

    Args:
        budget: what the experiments may take.
        seed: seed of the lens's training, and of the experiments.
    """

    def __init__(self, budget: Budget, seed: int) -> None:
        self.budget, self.seed = budget, seed

    @cached_property
    def model(self) -> InterpretableModel:
        """Return the model. `tiny` is trained first, if it is not there."""
        if self.budget.name != TINY:
            return InterpretableModel(self.budget.source)
        from benchmarks.paper.checkpoints import trained

        return InterpretableModel(trained(self.seed)[-1])

    @cached_property
    def lens(self) -> TunedLens:
        """Return the lens, trained by the recipe `fast` on the bundled text, or read from its file."""
        path = WORK / "lenses" / f"{self.budget.name}-{self.budget.tokens}-seed{self.seed}"
        if not path.with_suffix(".json").exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            settings = {"tokens": self.budget.tokens, "max_seq_len": LENGTH, "seed": self.seed, "vocabulary": "sampled"}
            metalens.train(self.model, bundled.TRAINING_TEXT, recipe="fast", out=path, resume=True, **settings)
        return TunedLens.load(path)

    @cached_property
    def sequences(self) -> list[mx.array]:
        """Return the held-out text as ids [T] of each sequence."""
        return list(Sequences(self.model, self.text, LENGTH, self.budget.held_out))

    @property
    def text(self) -> str:
        """Return the held-out text."""
        return bundled.HELD_OUT_TEXT.read_text(encoding="utf-8")

    def chosen_layers(self, most: int | None = None, last: bool = True) -> list[int]:
        """Return layers at equal distances.

        Args:
            most: the most layers. None = those of the budget.
            last: whether the last layer may be among them. It is the model's own output.
        """
        end = self.model.num_layers - (1 if last else 2)
        count = min(most or self.budget.layers, end + 1)
        return sorted({round(i * end / max(count - 1, 1)) for i in range(count)})
