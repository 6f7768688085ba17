"""Compare the recipes on two models: KL to the model, layer by layer, against the number of training tokens.

    python -m benchmarks.recipes [--models demo small] [--recipes paper fast ...] [--tokens 409600] [--out docs]

A run trains with `metalens.training.train` as a user would, and writes checkpoints; afterward the lens of each checkpoint is read on
held-out text. Each run is saved in benchmarks/results/recipes.json, so that the command can be interrupted and continued; --fresh starts
again. The command then writes docs/recipes.md and docs/recipes.png.

The budget of `paper` is scaled to models of this size: 200 steps of 2048 tokens (250 steps of 2^18 for models with billions of
parameters). `fast` runs with about a tenth of these tokens, its warm start included, and with all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metalens import InterpretableModel, TunedLens, accelerate
from metalens.models import bundled
from metalens.ops import lens_stats, normed
from metalens.readings.rows import lens_rows
from metalens.training import CheckpointFolder, Corpus, TrainingConfig, recipe, train

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "recipes.json"
# The small model has fewer layers and a smaller hidden size (tools/demo_models/README.md); its vocabulary and text are the demo model's.
MODELS = {"demo": bundled.MODEL, "small": HERE.parent / "tools" / "demo_models" / "small"}
BUDGET = 200 * 2048
LENGTH = 128
HELD_OUT = 8192
CHECKPOINTS = 8


@dataclass(frozen=True)
class Run:
    """One line of the comparison.

    Attributes:
        name: name of the line.
        config: settings of its training.
    """

    name: str
    config: TrainingConfig


def runs(tokens: int) -> list[Run]:
    """Return the runs to compare, for a budget of `tokens` training tokens."""

    def make(name: str, label: str, per_step: int, budget: int, **settings: Any) -> Run:
        settings = {"max_seq_len": LENGTH, "tokens_per_step": per_step, "seed": 0, "repeat": True, **settings}
        warm = settings.get("warm_start_tokens", 0)
        return Run(label, recipe(name, num_steps=(budget - warm) // per_step, **settings))

    return [
        make("paper", "paper", 2048, tokens),
        Run("ridge", recipe("ridge", max_seq_len=LENGTH, seed=0, repeat=True, warm_start_tokens=12288)),
        make("fast", "fast, short", 128, tokens * 105 // 1000, warm_start_tokens=12288),
        make("fast", "fast", 1024, tokens, warm_start_tokens=12288),
        make("muon", "muon", 1024, tokens),
        make("adam", "adam", 1024, tokens),
        make("mlxterp", "mlxterp", 512, tokens),
    ]


def measure(model_name: str, run: Run) -> dict[str, Any]:
    """Train a lens, then score the lens of each checkpoint on held-out text."""
    model = InterpretableModel(str(MODELS[model_name]))
    accelerate(model.model)
    corpus = Corpus.from_ids(np.array(model.training_ids([bundled.TRAINING_TEXT.read_text()])))
    ids = model.ids(bundled.HELD_OUT_TEXT.read_text())[0][:HELD_OUT]
    config = run.config
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointFolder(folder, keep=10**6)
        start = time.perf_counter()
        every = max(1, config.num_steps // CHECKPOINTS)
        lens = train(model, corpus, config=config, checkpoint_dir=checkpoints, checkpoint_every=every, show_progress=True)
        seconds = time.perf_counter() - start
        curve = []
        for step in checkpoints.steps():
            saved = checkpoints.read(step)
            for layer in lens.layers:
                for name in ("weight", "bias"):
                    setattr(lens.translators[layer], name, saved.arrays[f"parameters.{layer}.{name}"])
            curve.append({"tokens": saved.record["tokens"], "kl": held_out_kl(model, lens, ids)})
        if not curve:  # the closed form alone takes no step, and so writes no checkpoint
            curve.append({"tokens": config.warm_start_tokens, "kl": held_out_kl(model, lens, ids)})
    return {"model": model_name, "run": run.name, "config": config.to_dict(), "seconds": seconds, "curve": curve}


def held_out_kl(model: InterpretableModel, lens: TunedLens | None, ids: mx.array) -> list[float]:
    """Return the mean KL(model || lens) of every layer, in nats per token; None is the logit lens."""
    unembed, layers = model.unembed, len(model.source)
    total = np.zeros(layers)
    for start in range(0, ids.size - LENGTH + 1, 4 * LENGTH):
        batch = ids[start : start + 4 * LENGTH]
        hidden = [h.reshape(-1, h.shape[-1]) for h in model.source.capture(batch.reshape(-1, LENGTH)).hidden]
        rows = lens_rows(hidden, range(layers), lens or TunedLens(layers, hidden[0].shape[-1]), unembed.norm)
        kl = lens_stats(rows, unembed.head, 1, normed(hidden[-1], unembed.norm)).kl
        assert kl is not None
        total += np.array(mx.sum(kl, axis=1)).astype(np.float64)
    return [float(value) for value in total / (ids.size // LENGTH * LENGTH)]


def logit_lens_kl(model_name: str) -> list[float]:
    """Return the logit lens's mean KL of every layer on the held-out text, in nats per token."""
    model = InterpretableModel(str(MODELS[model_name]))
    accelerate(model.model)
    return held_out_kl(model, None, model.ids(bundled.HELD_OUT_TEXT.read_text())[0][:HELD_OUT])


def is_measured(found: list[dict[str, Any]], model: str, run: Run) -> bool:
    """Return whether the results hold this run of the model, with the same settings."""
    config = json.loads(json.dumps(run.config.to_dict()))
    return any(entry["model"] == model and entry["run"] == run.name and entry["config"] == config for entry in found)


def spent(entry: dict[str, Any]) -> tuple[int, float]:
    """Return the training tokens and the seconds of a run."""
    return entry["curve"][-1]["tokens"], entry["seconds"]


def mean(kl: list[float]) -> float:
    """Return the mean over layers."""
    return sum(kl) / len(kl)


def page(found: list[dict[str, Any]], logit: dict[str, list[float]]) -> str:
    """Return docs/recipes.md from the runs and the logit lens's KL of each model."""
    parts = [
        "# Recipes compared\n",
        "The tables show KL(model || lens) on held-out text, in nats per token, by layer and as the mean over layers; the number of training",
        "tokens, a warm start's included; and the wall time of the whole training. The held-out text has",
        f"{HELD_OUT} tokens that neither model nor lens has seen, in sequences of {LENGTH}.\n",
        "`python -m benchmarks.recipes` wrote this page from one run per line, on two shared CPU cores: compare times within one model only,",
        "and only roughly.\n",
        "![KL against tokens](recipes.png)\n",
    ]
    for model in dict.fromkeys(entry["model"] for entry in found):
        parts += section(model, [entry for entry in found if entry["model"] == model], logit[model])
    return "\n".join(parts) + "\n"


def section(model: str, entries: list[dict[str, Any]], logit: list[float]) -> Iterator[str]:
    """Yield the page's section about one model."""
    layers = len(logit)
    yield f"## {model}: {layers} layers\n\nMean KL of the logit lens: {mean(logit):.3f}\n"
    yield "| recipe | tokens per step | tokens | wall time, s | mean KL | " + " | ".join(f"layer {i}" for i in range(layers)) + " |"
    yield "|---|---:|---:|---:|---:|" + "---:|" * layers
    for entry in entries:
        kl, (tokens, seconds) = entry["curve"][-1]["kl"], spent(entry)
        cells = [entry["run"], str(entry["config"]["tokens_per_step"]), f"{tokens:,}", f"{seconds:.0f}", f"{mean(kl):.3f}"]
        yield "| " + " | ".join([*cells, *(f"{value:.3f}" for value in kl)]) + " |"
    by_run = {entry["run"]: entry for entry in entries}
    if {"paper", "fast, short", "fast"} <= set(by_run):
        paper, short, whole = (by_run[name] for name in ("paper", "fast, short", "fast"))
        kl = [mean(entry["curve"][-1]["kl"]) for entry in (paper, short, whole)]
        tokens, seconds = (100 * ours / theirs for ours, theirs in zip(spent(short), spent(paper), strict=True))
        yield (
            f"\nWith {tokens:.1f} % of paper's tokens and {seconds:.1f} % of its wall time, fast reaches {kl[1]:.4f} nats; paper reaches "
            f"{kl[0]:.4f}. With the same number of tokens, fast reaches {kl[2]:.4f}.\n"
        )


def picture(found: list[dict[str, Any]], path: Path) -> None:
    """Plot the mean KL against training tokens, one panel per model, and save the picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    models = list(dict.fromkeys(entry["model"] for entry in found))
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models), 4.5), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for entry in found:
            if entry["model"] == model:
                axis.plot([p["tokens"] for p in entry["curve"]], [mean(p["kl"]) for p in entry["curve"]], marker=".", label=entry["run"])
        axis.set(title=f"{model} model", xlabel="training tokens, thousands", ylabel="mean held-out KL, nats per token", xscale="log", yscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 4)))
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1000:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_minor_formatter(lambda kl, _: f"{kl:.2g}")
        axis.legend()
        axis.grid(which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure the runs that have no result yet, then write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [name for name, path in MODELS.items() if path.exists()]
    parser.add_argument("--models", nargs="*", default=models, choices=list(MODELS), help="models to measure; none = only write the page again")
    parser.add_argument("--recipes", nargs="*", help="names of the runs to measure [default: all]")
    parser.add_argument("--tokens", type=int, default=BUDGET, help="training tokens of a run [default: %(default)s]")
    parser.add_argument("--fresh", action="store_true", help="discard earlier results")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", help="folder of the page and the picture")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = [] if arguments.fresh or not RESULTS.exists() else json.loads(RESULTS.read_text())
    for model in arguments.models:
        for run in runs(arguments.tokens):
            if is_measured(found, model, run) or (arguments.recipes and run.name not in arguments.recipes):
                continue
            entry = measure(model, run)
            sys.stderr.write(f"{model} {run.name}: {mean(entry['curve'][-1]['kl']):.4f} after {entry['seconds']:.0f} s\n")
            found = [e for e in found if (e["model"], e["run"]) != (model, run.name)] + [entry]
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    logit = {model: logit_lens_kl(model) for model in dict.fromkeys(entry["model"] for entry in found)}
    (arguments.out / "recipes.md").write_text(page(found, logit))
    picture(found, arguments.out / "recipes.png")


if __name__ == "__main__":
    main()
