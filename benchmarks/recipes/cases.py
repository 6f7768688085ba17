"""What is compared: models, texts, seeds and recipes. A case is one training run."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from metalens.models import bundled

LENGTH = 128  # tokens of a sequence
TRAINING_CHARACTERS, HELD_OUT_CHARACTERS = 1_000_000, 100_000


@dataclass(frozen=True)
class Model:
    """A model of the comparison.

    Attributes:
        name: its name on the pages.
        source: its folder, or a name that `metalens.load` knows.
        tokens: training tokens of every run, a warm start's included.
        held_out: tokens that the lens is read on.
        few: number of layers, evenly spaced, of the runs that cost much: those with the full vocabulary, the long ones, and those that these are
            compared with. None = all.
        long: lines that also run with LONG_TOKENS.
        whole: lines that also run with the full vocabulary, for what the sample changes.
    """

    name: str
    source: str
    tokens: int
    held_out: int
    few: int | None = None
    long: tuple[str, ...] = ()
    whole: tuple[str, ...] = ("fast",)

    def layers(self, count: int) -> tuple[int, ...] | None:
        """Return the few layers of a model with `count`: from the first to the last but one. The last layer is exact. None = all."""
        if self.few is None:
            return None
        return tuple(round(i * (count - 2) / (self.few - 1)) for i in range(self.few))


# The budget of `paper`, scaled to models of this size (250 steps of 2^18 for models with billions of parameters).
LONG_TOKENS = 409_600
SMALL = Path(__file__).parents[2] / "tools" / "demo_models" / "small"
MODELS = {
    model.name: model
    for model in (
        Model("demo", str(bundled.MODEL), tokens=43_008, held_out=8192, long=("paper",)),
        Model("small", str(SMALL), tokens=43_008, held_out=8192, long=("paper",)),
        Model("smollm2", "smollm2", tokens=12_288, held_out=1024, few=6, long=("paper",), whole=("fast", "paper")),
        Model("gemma3-270m", "gemma3-270m", tokens=6_144, held_out=512, few=6, long=("paper",), whole=("fast", "paper")),
    )
}
SEEDS = (0, 1)
# {name: what it is, for the pages}
TEXTS = {"help": "the bundled text, pages of a desktop's help", "code": "modules of Python's standard library, as they are on the machine"}

# The recipe `fast` of version 0.1.0: steps of a fixed length in W's own coordinates, proportional to the distance of the warm start.
FORMER = {
    "step_size": "rate",
    "learning_rate": 0.025,
    "weight_decay": 0.15,
    "momentum": 0.8,
    "layer_rates": "distance",
    "guard_tokens": 0,
    "shuffle_tokens": 0,
}
# {line of the tables: (recipe, its settings)}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "ridge": ("ridge", {}),
    "fast": ("fast", {}),
    "fast 0.1.0": ("fast", FORMER),
    "muon": ("muon", {}),
    "adam": ("adam", {}),
    "mlxterp": ("mlxterp", {}),
    "paper": ("paper", {}),
}
# Variants: a run with the full vocabulary, with the tokens of long runs, with an eighth of them, or of few layers, as the first two have.
FULL, LONG, EIGHTH, FEW = "full", "long", "eighth", "few layers"


@dataclass(frozen=True)
class Case:
    """One training run.

    Attributes:
        model: name of the model.
        text: name of the text.
        seed: seed of the order of the text.
        line: line of the tables, a key of RECIPES, or "logit lens", which trains nothing.
        variant: "", FULL, LONG, EIGHTH or FEW.
        tokens: training tokens.
        settings: settings beside those of the recipe.
    """

    model: str
    text: str
    seed: int
    line: str
    variant: str = ""
    tokens: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def all_layers(self) -> bool:
        """Whether the run trains all layers of every model, and not the few of `Model.layers`."""
        return self.variant not in (FULL, LONG, FEW)

    def to_dict(self) -> dict[str, Any]:
        """Return the case as JSON holds it: two equal dictionaries are the same run."""
        return asdict(self)


def cases(model: Model) -> Iterator[Case]:
    """Yield the cases of a model, the most telling first."""
    for seed in SEEDS:
        for text in TEXTS:
            if seed == 0:
                yield Case(model.name, text, 0, "logit lens")
            for line, (_, settings) in RECIPES.items():
                yield Case(model.name, text, seed, line, "", model.tokens, {**settings, "vocabulary": "sampled"})
    # The full vocabulary costs a multiple, so one text and seed show what sampling changes.
    for line in model.whole:
        if model.few is not None:
            yield Case(model.name, "help", 0, line, FEW, model.tokens, {**RECIPES[line][1], "vocabulary": "sampled"})
        yield Case(model.name, "help", 0, line, FULL, model.tokens, {**RECIPES[line][1], "vocabulary": "full"})
    if model.few is None:  # on the others `fast` needs fewer tokens than an eighth
        for seed in SEEDS:
            yield Case(model.name, "help", seed, "fast", EIGHTH, LONG_TOKENS // 8, {"vocabulary": "sampled"})
    for line in model.long:
        for seed in SEEDS if model.few is None else (0,):
            yield Case(model.name, "help", seed, line, LONG, LONG_TOKENS, {**RECIPES[line][1], "vocabulary": "sampled", "repeat": True})


@cache
def texts(name: str) -> tuple[str, str]:
    """Return the training text and the held-out text of a name in TEXTS."""
    if name == "help":
        return bundled.TRAINING_TEXT.read_text(encoding="utf-8"), bundled.HELD_OUT_TEXT.read_text(encoding="utf-8")
    # An order that no directory decides. Whole files are in one of the two texts.
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: hashlib.sha256(path.name.encode()).digest())
    parts: list[str] = []
    for wanted in (HELD_OUT_CHARACTERS, TRAINING_CHARACTERS):
        taken = ""
        while modules and len(taken) < wanted:
            taken += modules.pop(0).read_text(encoding="utf-8", errors="replace") + "\n"
        parts.append(taken)
    return parts[1], parts[0]
