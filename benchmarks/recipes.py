"""Every recipe on two models: KL to the model, layer by layer, against the tokens seen.

    python -m benchmarks.recipes [--models demo small] [--recipes paper fast ...] [--tokens 409600] [--out docs]

A run trains with `metalens.training.train` as a user would, writing checkpoints; afterward the lens of each checkpoint is read on held-out text.
What was measured is kept in benchmarks/results/recipes.json, run by run, so that the command can be interrupted and goes on; --fresh starts anew.
Then it writes docs/recipes.md and docs/recipes.png.

The budget of `paper` is scaled to models of this size: 200 steps of 2048 tokens (2^18 and 250 for models of billions). `fast` runs with about a
tenth of these tokens, its warm start included, and with all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
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
# The second has another depth and width (tools/demo_models/README.md); its vocabulary and text are the demo's.
MODELS = {"demo": bundled.MODEL, "small": HERE.parent / "tools" / "demo_models" / "small"}
BUDGET = 200 * 2048
LENGTH = 128
HELD_OUT = 8192
CHECKPOINTS = 8


@dataclass(frozen=True)
class Run:
    """One line of the comparison."""

    name: str
    config: TrainingConfig


def runs(tokens: int) -> list[Run]:
    """What is compared, for a budget of so many tokens."""

    def made(name: str, label: str, per_step: int, budget: int, **settings: Any) -> Run:
        settings = {"max_seq_len": LENGTH, "tokens_per_step": per_step, "seed": 0, "repeat": True, **settings}
        warm = settings.get("warm_start_tokens", 0)
        return Run(label, recipe(name, num_steps=(budget - warm) // per_step, **settings))

    return [
        made("paper", "paper", 2048, tokens),
        made("fast", "fast, short", 128, tokens * 105 // 1000, warm_start_tokens=12288),
        made("fast", "fast", 1024, tokens, warm_start_tokens=12288),
        made("muon", "muon", 1024, tokens),
        made("adam", "adam", 1024, tokens),
        made("mlxterp", "mlxterp", 512, tokens),
    ]


def measure(model_name: str, run: Run) -> dict[str, Any]:
    """Train, then read held-out text with the lens of each checkpoint."""
    model = InterpretableModel(str(MODELS[model_name]))
    accelerate(model.model)
    corpus = Corpus.from_ids(np.array(model.training_ids([bundled.TRAINING_TEXT.read_text()])))
    ids = model.ids(bundled.HELD_OUT_TEXT.read_text())[0][:HELD_OUT]
    config, unembed = run.config, model.unembed
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = CheckpointFolder(folder, keep=10**6)
        start = time.perf_counter()
        every = max(1, config.num_steps // CHECKPOINTS)
        lens = train(model.source, unembed, corpus, config, checkpoints=checkpoints, checkpoint_every=every, show_progress=True)
        seconds = time.perf_counter() - start
        curve = []
        for step in checkpoints.steps():
            saved = checkpoints.read(step)
            for layer in lens.layers:
                for name in ("weight", "bias"):
                    setattr(lens.translators[layer], name, saved.arrays[f"parameters.{layer}.{name}"])
            curve.append({"tokens": saved.record["tokens"], "kl": held_out_kl(model, lens, ids)})
    return {"model": model_name, "run": run.name, "config": config.to_dict(), "seconds": seconds, "curve": curve}


def held_out_kl(model: InterpretableModel, lens: TunedLens | None, ids: mx.array) -> list[float]:
    """Mean KL(model || lens) of every layer, nats per token."""
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


def spent(entry: dict[str, Any]) -> tuple[int, float]:
    """(tokens, seconds) of a run."""
    return entry["curve"][-1]["tokens"], entry["seconds"]


def mean(kl: list[float]) -> float:
    """Over layers."""
    return sum(kl) / len(kl)


def page(found: list[dict[str, Any]], logit: dict[str, list[float]]) -> str:
    """docs/recipes.md."""
    parts = [
        "# Recipes compared\n",
        "Mean held-out KL(model || lens) over layers, nats per token, after so many training tokens (a warm start's included), and the wall time of",
        f"the whole loop. {HELD_OUT} held-out tokens that neither model nor lens has seen; sequences of {LENGTH}. Written by",
        "`python -m benchmarks.recipes`, one run per line, on two shared CPU cores: times compare within one model only, and roughly.\n",
        "![KL against tokens](recipes.png)\n",
    ]
    for model in dict.fromkeys(entry["model"] for entry in found):
        of_model = [entry for entry in found if entry["model"] == model]
        layers = len(of_model[0]["curve"][-1]["kl"])
        parts.append(f"## {model}: {layers} layers\n\nLogit lens: {mean(logit[model]):.3f}\n")
        parts.append("| recipe | tokens per step | tokens | wall time, s | mean KL | " + " | ".join(f"layer {i}" for i in range(layers)) + " |")
        parts.append("|---|---:|---:|---:|---:|" + "---:|" * layers)
        for entry in of_model:
            last = entry["curve"][-1]
            cells = [
                entry["run"],
                str(entry["config"]["tokens_per_step"]),
                f"{last['tokens']:,}",
                f"{entry['seconds']:.0f}",
                f"{mean(last['kl']):.3f}",
            ]
            parts.append("| " + " | ".join([*cells, *(f"{kl:.3f}" for kl in last["kl"])]) + " |")
        by_run = {entry["run"]: entry for entry in of_model}
        if {"paper", "fast, short", "fast"} <= set(by_run):
            paper, short, whole = (by_run[name] for name in ("paper", "fast, short", "fast"))
            kl = [mean(entry["curve"][-1]["kl"]) for entry in (paper, short, whole)]
            tokens, seconds = (100 * ours / theirs for ours, theirs in zip(spent(short), spent(paper), strict=True))
            parts.append(
                f"\nWith {tokens:.1f} % of paper's tokens and {seconds:.1f} % of its wall time fast is at {kl[1]:.4f} nats, paper at {kl[0]:.4f}; "
                f"with as many tokens fast is at {kl[2]:.4f}.\n"
            )
    return "\n".join(parts) + "\n"


def picture(found: list[dict[str, Any]], path: Path) -> None:
    """Mean KL against tokens, one panel per model."""
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
    """Measure what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[name for name, path in MODELS.items() if path.exists()], choices=list(MODELS))
    parser.add_argument("--recipes", nargs="*")
    parser.add_argument("--tokens", type=int, default=BUDGET)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = [] if arguments.fresh or not RESULTS.exists() else json.loads(RESULTS.read_text())
    for model in arguments.models:
        for run in runs(arguments.tokens):
            known = any(e["model"] == model and e["run"] == run.name and e["config"] == json.loads(json.dumps(run.config.to_dict())) for e in found)
            if known or (arguments.recipes and run.name not in arguments.recipes):
                continue
            entry = measure(model, run)
            sys.stderr.write(f"{model} {run.name}: {mean(entry['curve'][-1]['kl']):.4f} after {entry['seconds']:.0f} s\n")
            found = [e for e in found if (e["model"], e["run"]) != (model, run.name)] + [entry]
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    logit = {}
    for model in dict.fromkeys(entry["model"] for entry in found):
        loaded = InterpretableModel(str(MODELS[model]))
        accelerate(loaded.model)
        logit[model] = held_out_kl(loaded, None, loaded.ids(bundled.HELD_OUT_TEXT.read_text())[0][:HELD_OUT])
    (arguments.out / "recipes.md").write_text(page(found, logit))
    picture(found, arguments.out / "recipes.png")


if __name__ == "__main__":
    main()
