"""One measurement in a process of its own: `python -m benchmarks.time_to_quality.visits VISIT` prints its result.

A visit is a training run of metalens or of a former version of it, some training steps of a competitor, or a step of metalens beside a forward
pass. Core seconds are user and system time of all threads. The process may use THREADS cores, so that no library's threads wait for each other;
nothing else is pinned.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.competitor import PLAIN, TORCH, TORCH_BF16
from benchmarks.recipes.cases import LENGTH, MODELS, RECIPES, texts

ROOT = Path(__file__).parents[2]
THREADS = 1
TEXT = "help"
COMPETITORS = (TORCH, TORCH_BF16, PLAIN)
STEP_COST = "a step beside a forward pass"
FORMER_VERSION, FORMER_COMMIT = "metalens 0.1.0", "95c24b2"
FORMER_CLOSED = f"{FORMER_VERSION} with num_steps=0"  # only its closed form, which has been the recipe `ridge` since
FORMERS = (FORMER_VERSION, FORMER_CLOSED)
TORCH_SEQUENCES = 4  # of a step in PyTorch, each with a forward and backward pass of its own
PLAIN_TOKENS = 16  # of a step in plain MLX, whose products take about a second for each GFLOP
# {(model, competitor): why it takes no part}
LEFT_OUT = {
    (
        "gemma3-270m",
        PLAIN,
    ): "on a CPU, MLX adds the terms of a quantized bfloat16 product in bfloat16, and the model's logits come out too far off to be "
    "used (`metalens` rejects them)"
}
# A step that takes longer than this for each token is measured once.
SLOW_SECONDS = 0.01


@dataclass(frozen=True)
class Visit:
    """A measurement.

    Attributes:
        model: name of the model, a key of MODELS.
        name: a recipe of RECIPES, one of FORMERS, which have the settings of the recipe `fast`, a competitor, or STEP_COST.
        tokens: training tokens of a run; 0 for steps.
        vocabulary: of a run.
    """

    model: str
    name: str
    tokens: int = 0
    vocabulary: str = "sampled"

    @property
    def key(self) -> str:
        """Return the visit as a key of the file of results."""
        return f"{self.name}, {self.vocabulary} vocabulary, {self.tokens} tokens" if self.tokens else self.name


@dataclass
class Measured:
    """What visits to the same thing found.

    Attributes:
        core_seconds: core seconds of a run, one for each visit; of a token for steps, the median of a visit.
        extra_bytes: growth of the process's peak memory during the run or the steps, one for each visit.
        kl: held-out KL of a run's lens at the trained layers, by the full vocabulary.
        config: settings of a run, as the lens's provenance has them.
        forward: core seconds of a token in a forward pass with the model's own logits, for STEP_COST.
    """

    core_seconds: list[float] = field(default_factory=list)
    extra_bytes: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    forward: list[float] = field(default_factory=list)

    def add(self, other: Measured) -> None:
        """Add another visit."""
        self.core_seconds += other.core_seconds
        self.extra_bytes += other.extra_bytes
        self.forward += other.forward
        self.kl, self.config = other.kl or self.kl, other.config or self.config

    @property
    def seconds(self) -> float:
        """Return the median of the core seconds."""
        return float(np.median(self.core_seconds))

    @property
    def forward_seconds(self) -> float:
        """Return the median of the core seconds of a token in a forward pass."""
        return float(np.median(self.forward))


def visit(wanted: Visit, former_python: str | None = None) -> Measured:
    """Measure in a fresh process. `former_python` is a Python in which FORMER_VERSION is installed, for visits of it."""
    environment = os.environ | ({"METALENS_BACKEND": "reference"} if wanted.name == PLAIN else {})
    command = [sys.executable, "-m", "benchmarks.time_to_quality.visits", json.dumps(asdict(wanted)), *filter(None, [former_python])]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


# ---------------------------------------------------------------------- in the process


def measured(wanted: Visit, former_python: str | None = None) -> Measured:
    """Measure in this process."""
    if wanted.name in FORMERS:
        if former_python is None:
            raise ValueError(f"A visit of {FORMER_VERSION} needs a Python in which it is installed: give --former PYTHON.")
        return _former_run(wanted, former_python)
    if wanted.name == STEP_COST:
        return _step_cost(wanted.model)
    return _run(wanted) if wanted.name in RECIPES else _steps(wanted)


def _run(wanted: Visit) -> Measured:
    """Train as a user would, from text to lens, and read the lens on held-out text."""
    from benchmarks.recipes.measure import scores
    from benchmarks.worker import peak_growth

    import metalens
    from metalens import InterpretableModel

    model_of, (training_text, held_out_text) = MODELS[wanted.model], texts(TEXT)
    recipe, settings = RECIPES[wanted.name]
    model = InterpretableModel(model_of.source)
    layers = model_of.layers(len(model.source))
    settings = {"max_seq_len": LENGTH, "seed": 0, "layers": layers, "vocabulary": wanted.vocabulary, "repeat": True, **settings}
    found = Measured()

    def train() -> Any:
        start = time.process_time()
        lens = metalens.train(model, [training_text], recipe=recipe, tokens=wanted.tokens, **settings)
        found.core_seconds.append(time.process_time() - start)
        return lens

    lens, extra = peak_growth(train)
    found.extra_bytes.append(extra)
    found.config = lens.provenance["training"]
    found.kl = scores(model, lens, range(len(model.source)) if layers is None else layers, held_out_text, model_of.held_out, marginals=False)["kl"]
    return found


def _former_run(wanted: Visit, python: str) -> Measured:
    """Train with a former version, in a process of its own on the same cores, and read its lens on held-out text with today's code."""
    from benchmarks.recipes.measure import scores

    from metalens import InterpretableModel, TunedLens

    model_of, (training_text, held_out_text) = MODELS[wanted.model], texts(TEXT)
    model = InterpretableModel(model_of.source)  # on disk from now on, also if its name is one that only today's version knows
    layers = model_of.layers(len(model.source))
    with tempfile.TemporaryDirectory() as folder:
        text, lens_path = Path(folder) / "text.txt", Path(folder) / "lens"
        text.write_text(training_text, encoding="utf-8")
        request: dict[str, Any] = {
            "model": model.name,
            "text": str(text),
            "tokens": wanted.tokens,
            "length": LENGTH,
            "layers": layers,
            "lens": str(lens_path),
        }
        request["closed_form"] = wanted.name == FORMER_CLOSED
        command = [python, "-I", str(Path(__file__).with_name("former_run.py")), json.dumps(request)]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, check=True, text=True)
        lens = TunedLens.load(lens_path)
    found = Measured(**json.loads(done.stdout.splitlines()[-1]), config=lens.provenance["training"])
    if "vocabulary" in found.config:
        raise ValueError(f"{python} runs a metalens that samples the vocabulary. Install commit {FORMER_COMMIT} in it, which did not.")
    found.kl = scores(model, lens, range(len(model.source)) if layers is None else layers, held_out_text, model_of.held_out, marginals=False)["kl"]
    return found


def _steps(wanted: Visit) -> Measured:
    """Take training steps of a competitor. A first one, which prepares memory and threads, does not count, unless steps are slow."""
    from benchmarks.worker import peak_growth

    step, tokens = _step_of(wanted.name, wanted.model)

    def timed() -> float:
        start = time.process_time()
        step()
        return (time.process_time() - start) / tokens

    seconds, extra = peak_growth(timed)
    if seconds < SLOW_SECONDS:
        seconds = float(np.median([timed() for _ in range(2)]))
    return Measured([seconds], [extra])


def _step_of(name: str, model_name: str) -> tuple[Callable[[], Any], int]:
    """Return a function that takes one step of the recipe `paper` as a competitor, and the tokens of this step."""
    import mlx.core as mx

    from metalens import InterpretableModel
    from metalens.training import recipe, train_loop

    of_model = MODELS[model_name]
    model = InterpretableModel(of_model.source)
    layers = of_model.layers(len(model.source))
    ids = np.array(model.training_ids([texts(TEXT)[0][:16000]]))
    settings: dict[str, Any] = {"num_steps": 1, "guard_tokens": 0, "layers": layers, "embedding": False}
    if name == PLAIN:
        config = recipe("paper", max_seq_len=PLAIN_TOKENS, tokens_per_step=PLAIN_TOKENS, **settings)
        return lambda: train_loop(model.source, model.unembed, mx.array(ids[:PLAIN_TOKENS]), config), PLAIN_TOKENS
    from benchmarks.torch_hub import HubModel
    from benchmarks.torch_lens import TorchModel, train

    config = recipe("paper", max_seq_len=LENGTH, tokens_per_step=TORCH_SEQUENCES * LENGTH, **settings)
    torch_model = TorchModel(model.model) if model.model.model_type == "llama" else HubModel(Path(str(model.name)), model.model)
    sequences = list(ids[: TORCH_SEQUENCES * LENGTH].astype(np.int64).reshape(-1, 1, LENGTH))
    return lambda: train(torch_model, sequences, config, name == TORCH_BF16), TORCH_SEQUENCES * LENGTH


def _step_cost(model_name: str) -> Measured:
    """Measure steps of `fast` on all layers, 512 tokens each, and forward passes with the model's own logits."""
    from benchmarks.step_cost import step_and_forward

    from metalens import InterpretableModel

    (_, step), (_, forward) = step_and_forward(InterpretableModel(MODELS[model_name].source), tokens=512)
    return Measured([float(step)], forward=[float(forward)])


if __name__ == "__main__":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    sys.stdout.write(json.dumps(asdict(measured(Visit(**json.loads(sys.argv[1])), *sys.argv[2:]))) + "\n")
