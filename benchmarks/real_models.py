"""Compare the logit lens, the closed form and the recipe `fast` on pretrained models: held-out KL and top-1 agreement, layer by layer.

    python -m benchmarks.real_models smollm2=FOLDER gemma3-270m=FOLDER [--steps 24] [--out docs]

A model is a name for the page and its folder (or any name that `metalens.load` takes). Six layers of each are trained with
`metalens.training.train`, on the bundled text and in sequences of 128 tokens; the lens is read on the bundled held-out text. Each run is
saved in benchmarks/results/real_models.json, so that the command can be interrupted and continued; --fresh starts again. The command then
writes docs/real-models.md from these results; without a model it only writes the page.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metalens import InterpretableModel, TunedLens
from metalens.models.bundled import HELD_OUT_TEXT, TRAINING_TEXT
from metalens.ops import lens_stats, normed
from metalens.readings.rows import lens_rows
from metalens.training import TrainingConfig, recipe, train

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "real_models.json"
LENGTH = 128
WARM_START = 4096
HELD_OUT = 512
LAYERS = 6

# The recipe `fast` until issue 14: a step of fixed length in W's own coordinates, proportional to the distance that the warm start moved a layer.
OLD_FAST = {"step_size": "rate", "learning_rate": 0.025, "weight_decay": 0.15, "layer_rates": "distance", "guard_tokens": 0}


def layers_of(count: int) -> tuple[int, ...]:
    """Return the layers to train: evenly spaced, from the first to the last but one. The last layer is exact."""
    return tuple(round(i * (count - 2) / (LAYERS - 1)) for i in range(LAYERS))


def runs(layers: tuple[int, ...], steps: int) -> dict[str, TrainingConfig | None]:
    """Return the settings of each line of the comparison; None = the logit lens."""
    common: dict[str, Any] = {"max_seq_len": LENGTH, "tokens_per_step": LENGTH, "warm_start_tokens": WARM_START, "seed": 0, "repeat": False}
    common["layers"] = layers
    return {
        "logit lens": None,
        "ridge": recipe("ridge", **common),
        "fast": recipe("fast", num_steps=steps, **common),
        "fast before": recipe("fast", num_steps=steps, **common, **OLD_FAST),
    }


def held_out(model: InterpretableModel, lens: TunedLens, layers: tuple[int, ...]) -> dict[str, list[float]]:
    """Return KL(model || lens) in nats per token and the share of tokens with the model's top-1, for each layer, on the held-out text."""
    ids = np.array(model.training_ids([HELD_OUT_TEXT.read_text(encoding="utf-8")]))
    first, other = (np.array(model.ids(text)[0])[:1] for text in ("a", "b"))
    prefix = first if np.array_equal(first, other) else first[:0]  # a model's special token belongs before every sequence
    room = LENGTH - prefix.size
    text = ids[prefix.size : prefix.size + HELD_OUT // LENGTH * room].reshape(-1, room)
    sequences = np.concatenate([np.tile(prefix, (len(text), 1)), text], axis=1)
    kl, agrees, tokens = np.zeros(len(layers)), np.zeros(len(layers)), 0
    for start in range(0, len(sequences), 4):
        hidden = [h.reshape(-1, h.shape[-1]) for h in model.source.capture(mx.array(sequences[start : start + 4])).hidden]
        rows = lens_rows(hidden, layers, lens, model.unembed.norm)
        stats = lens_stats(rows, model.unembed.head, 1, normed(hidden[-1].astype(mx.float32), model.unembed.norm))
        assert stats.kl is not None
        assert stats.agrees is not None
        kl += np.array(mx.sum(stats.kl, axis=1))
        agrees += np.array(mx.sum(stats.agrees.astype(mx.float32), axis=1))
        tokens += hidden[-1].shape[0]
    return {"kl": (kl / tokens).tolist(), "top1": (agrees / tokens).tolist()}


def measure(name: str, source: str, steps: int, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results with those of one model. A run whose settings have a result is not repeated."""
    model = InterpretableModel(source)
    layers = layers_of(len(model.source))
    for run, config in runs(layers, steps).items():
        settings = None if config is None else json.loads(json.dumps(config.to_dict()))
        if any((entry["model"], entry["run"], entry["config"]) == (name, run, settings) for entry in found):
            continue
        start = time.process_time()
        text = TRAINING_TEXT.read_text(encoding="utf-8")
        lens = TunedLens(len(model.source), model.unembed.hidden_dim) if config is None else train(model, [text], config=config)
        seconds = time.process_time() - start
        entry = {"model": name, "run": run, "config": settings, "layers": list(layers), "seconds": seconds, **held_out(model, lens, layers)}
        sys.stderr.write(f"{name} {run}: {[round(value, 3) for value in entry['kl']]} after {seconds:.0f} s\n")
        found = [e for e in found if (e["model"], e["run"]) != (name, run)] + [entry]
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    return found


def tokens_of(config: dict[str, Any] | None) -> str:
    """Return the tokens of a run in words: those of the warm start, and those of the steps."""
    if config is None:
        return "0"
    steps = config["num_steps"] * config["tokens_per_step"]
    return f"{config['warm_start_tokens']:,}" + (f" + {steps:,}" if steps else "")


def page(found: list[dict[str, Any]]) -> str:
    """Return docs/real-models.md."""
    parts = [
        "# Recipes on pretrained models\n",
        f"KL(model || lens) in nats per token on {HELD_OUT} held-out tokens, in sequences of {LENGTH}, and in brackets the share of tokens whose",
        "most likely next token is the model's. Tokens are those of the warm start and those of the steps; CPU time is the whole training's, in",
        "seconds of one core. `python -m benchmarks.real_models` made this page from one run per line.\n",
        "`fast before` is the recipe `fast` with the settings that it had before steps followed the loss (learning rate 0.025 times the distance of",
        "the warm start, decay 0.15, no guard). All runs read the same text; `fast` holds a few sequences of it back.\n",
    ]
    for model in dict.fromkeys(entry["model"] for entry in found):
        entries = [entry for entry in found if entry["model"] == model]
        parts.append(f"## {model}\n")
        parts.append("| recipe | tokens | CPU time, s | mean KL | " + " | ".join(f"layer {i}" for i in entries[0]["layers"]) + " |")
        parts.append("|---|---:|---:|---:|" + "---:|" * len(entries[0]["layers"]))
        for entry in entries:
            cells = [entry["run"], tokens_of(entry["config"]), f"{entry['seconds']:.0f}", f"{np.mean(entry['kl']):.3f}"]
            cells += [f"{kl:.3f} ({100 * top1:.0f} %)" for kl, top1 in zip(entry["kl"], entry["top1"], strict=True)]
            parts.append("| " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    """Measure the runs that have no result yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER", help="models to measure; none = only write the page again")
    parser.add_argument("--steps", type=int, default=24, help="steps of 128 tokens [default: %(default)s]")
    parser.add_argument("--fresh", action="store_true", help="discard earlier results")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", help="folder of the page")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = [] if arguments.fresh or not RESULTS.exists() else json.loads(RESULTS.read_text())
    for given in arguments.models:
        name, _, source = given.partition("=")
        found = measure(name, source or name, arguments.steps, found)
    (arguments.out / "real-models.md").write_text(page(found))


if __name__ == "__main__":
    main()
