"""From nothing to a lens as good as the paper's recipe ends with: core seconds of metalens, of PyTorch and of plain MLX.

    python -m benchmarks.time_to_quality [--models demo smollm2] [--rounds 3] [--out docs]

The mark is the held-out KL that the recipe `paper` reaches with 409,600 tokens. metalens reaches it with the cheapest run in
benchmarks/results/recipes.json whose lens is at least as good; `python -m benchmarks.recipes` measures these runs and their core seconds.
The others would take hours to days, so this command measures the core seconds of some steps of theirs, in turn, and multiplies:

 * PyTorch, the paper's recipe as upstream's tuned-lens runs it (benchmarks/torch_lens.py), for all 409,600 tokens;
 * plain MLX, written well (every layer's own backward pass, one batched call of the head), on the tokens of metalens's own run.

Core seconds are user and system time of all threads. The command writes benchmarks/results/time_to_quality.json,
docs/time-to-quality.md and its picture.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.competitor import PLAIN, TORCH, TORCH_BF16
from benchmarks.recipes.cases import LENGTH, LONG, LONG_TOKENS, MODELS, texts
from benchmarks.recipes.page import Entry, mean, select

ROOT = Path(__file__).parent.parent
RECIPES, RESULTS = (ROOT / "benchmarks" / "results" / name for name in ("recipes.json", "time_to_quality.json"))
COMPETITORS = (TORCH, TORCH_BF16, PLAIN)
PLAIN_TOKENS = 8  # of the one step in plain MLX, whose products take about a second for each GFLOP


# ---------------------------------------------------------------------- one step of a competitor, in a process of its own


def step_of(name: str, model_name: str) -> tuple[Callable[[], Any], int]:
    """Return a function that takes one training step, and the tokens of this step."""
    import mlx.core as mx

    from metalens import InterpretableModel
    from metalens.training import recipe, train_loop

    of_model = MODELS[model_name]
    model = InterpretableModel(of_model.source)
    layers = of_model.layers(len(model.source))
    ids = np.array(model.training_ids([texts("help")[0][:8000]]))
    if name == PLAIN:
        config = recipe("paper", num_steps=1, max_seq_len=PLAIN_TOKENS, tokens_per_step=PLAIN_TOKENS, guard_tokens=0, layers=layers)
        return lambda: train_loop(model.source, model.unembed, mx.array(ids[:PLAIN_TOKENS]), config), PLAIN_TOKENS
    from benchmarks.torch_lens import TorchModel, train

    config = recipe("paper", num_steps=1, max_seq_len=LENGTH, tokens_per_step=LENGTH, layers=layers)
    torch_model, sequences = TorchModel(model.model), [ids[:LENGTH].astype(np.int64)[None]]
    return lambda: train(torch_model, sequences, config, name == TORCH_BF16), LENGTH


def core_seconds(name: str, model: str, rounds: int) -> list[float]:
    """Return the core seconds for each token of some steps. A first step, which prepares memory and threads, does not count; in plain MLX it does."""
    step, tokens = step_of(name, model)
    if name != PLAIN:
        step()
    found = []
    for _ in range(1 if name == PLAIN else rounds):
        start = time.process_time()
        step()
        found.append((time.process_time() - start) / tokens)
    return found


def in_a_process(name: str, model: str, rounds: int) -> list[float]:
    """Return `core_seconds` of a fresh process."""
    environment = os.environ | ({"METALENS_BACKEND": "reference"} if name == PLAIN else {})
    command = [sys.executable, "-m", "benchmarks.time_to_quality", "--step", json.dumps([name, model, rounds])]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---------------------------------------------------------------------- the page


def mark_and_run(entries: list[Entry]) -> tuple[float, Entry] | None:
    """Return paper's final KL, and the cheapest run that is at least as good; None before both were measured."""
    papers = select(entries, line="paper", variant=LONG)
    if not papers:
        return None
    mark = mean(papers[0]["kl"])
    good = [e for e in select(entries, text=papers[0]["case"]["text"]) if "cpu_seconds" in e and e["case"]["line"] in ("ridge", "fast")]
    good = [entry for entry in good if mean(entry["kl"]) <= mark]
    return (mark, min(good, key=lambda entry: float(entry["cpu_seconds"]))) if good else None


def rows(model: str, entries: list[Entry], steps: dict[str, list[float]]) -> Iterator[tuple[str, float, str]]:
    """Yield (implementation, core seconds, how they are known), metalens first."""
    found = mark_and_run(entries)
    if found is None:
        return
    _, ours = found
    line = ours["case"]["line"] + (", full vocabulary" if ours["case"]["settings"].get("vocabulary") == "full" else "")
    yield f"metalens, `{line}`", ours["cpu_seconds"], f"measured, {ours['case']['tokens']:,} tokens"
    for whole in select(entries, line="fast", variant="full"):
        yield "metalens, `fast`, full vocabulary", whole["cpu_seconds"], f"measured, {whole['case']['tokens']:,} tokens, KL {mean(whole['kl']):.4f}"
    for paper in select(entries, line="paper", variant=LONG):
        yield "metalens, `paper`, sampled vocabulary", paper["cpu_seconds"], f"measured, {LONG_TOKENS:,} tokens"
    for name, seconds in steps.items():
        tokens = ours["case"]["tokens"] if name == PLAIN else LONG_TOKENS
        what = "the steps of metalens's run, full vocabulary" if name == PLAIN else "`paper` as upstream runs it"
        yield f"{name}, {what}", float(np.median(seconds)) * tokens, f"{np.median(seconds) * 1e3:.1f} ms for each of {tokens:,} tokens"


def page(results: dict[str, dict[str, list[float]]], found: list[Entry]) -> str:
    """Return docs/time-to-quality.md."""
    parts = [
        "# Time to quality\n",
        f"How long it takes from nothing to a lens that is as good as the recipe `paper` makes with {LONG_TOKENS:,} tokens. Goodness is the mean",
        "KL(model || lens) of the trained layers on held-out text, by the full vocabulary. Core seconds are user and system time of all threads: on",
        "two cores, half of them is the time to wait. `python -m benchmarks.time_to_quality` wrote this page; its docstring says how every number is",
        "found. The runs of metalens are those of [Recipes compared](recipes.md). The competitors' steps are measured, and their runs are not: the",
        "table multiplies.\n",
        "![Core seconds to the same quality](time-to-quality.png)\n",
    ]
    for model in MODELS:
        entries = select(found, model=model)
        reached = mark_and_run(entries)
        if model not in results or reached is None:
            continue
        mark, ours = reached
        parts.append(
            f"## {model}\n\n{len(ours['layers'])} layers. `paper` ends at {mark:.4f} nats; this run of metalens at {mean(ours['kl']):.4f}.\n"
        )
        parts += ["| implementation | core seconds | beside metalens | known by |", "|---|---:|---:|---|"]
        for name, seconds, how in rows(model, entries, results[model]):
            parts.append(f"| {name} | {seconds:,.0f} | {seconds / ours['cpu_seconds']:.1f} | {how} |")
        parts.append("")
    return "\n".join(parts) + "\n"


def picture(results: dict[str, dict[str, list[float]]], found: list[Entry], path: Path) -> None:
    """Draw the core seconds of every implementation as bars, one panel for each model."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    models = [model for model in results if mark_and_run(select(found, model=model))]
    if not models:
        return
    figure, axes = plt.subplots(len(models), 1, figsize=(9, 2.1 * len(models) + 0.4), squeeze=False, sharex=True)
    for axis, model in zip(axes.flat, models, strict=True):
        bars = list(rows(model, select(found, model=model), results[model]))
        colors = ["#D55E00" if i == 0 else "#0072B2" for i in range(len(bars))]
        axis.barh([name.replace("`", "") for name, _, _ in bars], [seconds for _, seconds, _ in bars], color=colors)
        axis.bar_label(axis.containers[0], [f" {seconds:,.0f} s" for _, seconds, _ in bars], fontsize=8)
        axis.set(title=model, xscale="log")
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=8)
    axes.flat[-1].set_xlabel("core seconds to the KL that paper ends with")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure the steps, then write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["demo", "small", "smollm2"], choices=list(MODELS), help="none = only write the page again")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each competitor [default: %(default)s]")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the page and the picture")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        sys.stdout.write(json.dumps(core_seconds(*json.loads(arguments.step))) + "\n")
        return
    results: dict[str, dict[str, list[float]]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for model in arguments.models:
        results[model] = {name: in_a_process(name, model, arguments.rounds) for name in COMPETITORS}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    found = json.loads(RECIPES.read_text())
    (arguments.out / "time-to-quality.md").write_text(page(results, found))
    picture(results, found, arguments.out / "time-to-quality.png")


if __name__ == "__main__":
    main()
