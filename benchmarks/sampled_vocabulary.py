"""Compare steps on a sample of the vocabulary with steps on all of it, at equal tokens: held-out KL against the size of the sample.

    python -m benchmarks.sampled_vocabulary demo small=tools/demo_models/small smollm2 [--layers 0,9,19] [--steps 120] [--sizes full,1,2] [--out docs]

A model is a name (for the page) and its folder, or any name that `metalens.load` takes. The recipe is `fast`, on the bundled text in steps of one
sequence of 128 tokens; only `vocabulary` differs. --sizes are 'full' and multiples of the size that `vocabulary="sampled"` chooses. Each run is saved
in benchmarks/results/sampled_vocabulary.json, so that the command can be interrupted and continued; --fresh starts again. The command then writes
docs/sampled-vocabulary.md from these results; without a model it only writes the page.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.recipes.cases import LENGTH, texts
from benchmarks.recipes.measure import scores

from metalens import InterpretableModel
from metalens.models.bundled import TRAINING_TEXT
from metalens.training import TrainingConfig, recipe, train
from metalens.training.vocabulary import sample_size

RESULTS = Path(__file__).parent / "results" / "sampled_vocabulary.json"
WARM_START = 8192
HELD_OUT = 2048

Entry = dict[str, Any]


def configuration(size: str, tokens: int, layers: tuple[int, ...], steps: int) -> TrainingConfig:
    """Return the settings of a run. `size` is 'full', or a multiple of the size that "sampled" has for `tokens` ids."""
    chosen = sample_size("sampled", tokens)
    vocabulary: Any = "full" if size == "full" else max(16, round(float(size) * (chosen or tokens)))
    settings: dict[str, Any] = {"max_seq_len": LENGTH, "tokens_per_step": LENGTH, "warm_start_tokens": WARM_START, "seed": 0, "repeat": True}
    return recipe("fast", num_steps=steps, layers=layers, vocabulary=vocabulary, **settings)


def measure(name: str, source: str, layers: str, steps: int, sizes: list[str], found: list[Entry]) -> list[Entry]:
    """Return the results with those of one model. A run whose settings have a result is not repeated."""
    model = InterpretableModel(source)
    tokens, text = model.unembed.head.tokens, TRAINING_TEXT.read_text(encoding="utf-8")
    chosen = tuple(map(int, layers.split(","))) if layers else tuple(range(len(model.source)))
    for size in sizes:
        config = configuration(size, tokens, chosen, steps)
        settings = json.loads(json.dumps(config.to_dict()))
        if any((entry["model"], entry["config"]) == (name, settings) for entry in found):
            continue
        start = time.process_time()
        lens = train(model, [text], config=config)
        seconds = time.process_time() - start
        entry = {"model": name, "tokens": tokens, "config": settings, "layers": list(chosen), "seconds": seconds}
        entry |= scores(model, lens, chosen, texts("help")[1], HELD_OUT, marginals=False)
        sys.stderr.write(f"{name} {config.vocabulary}: mean KL {np.mean(entry['kl']):.4f} after {seconds:.0f} s\n")
        found = [*results(), entry]  # another model may be measured at the same time
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    return found


def results() -> list[Entry]:
    """Return the results so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def ids_of(entry: Entry) -> int:
    """Return the number of ids that a step of a run compares."""
    return sample_size(entry["config"]["vocabulary"], entry["tokens"]) or entry["tokens"]


def page(found: list[Entry]) -> str:
    """Return docs/sampled-vocabulary.md."""
    parts = [
        "# Sampled vocabulary: what it costs in KL\n",
        f"KL(model || lens) in nats per token on {HELD_OUT:,} held-out tokens, always over the full vocabulary, after equal training but for",
        "`vocabulary`: the recipe `fast`, one sequence of 128 tokens a step. `python -m benchmarks.sampled_vocabulary` made this page from one run",
        'per line. In bold: the sample of `vocabulary="sampled"`. CPU time is the whole training\'s, warm start and guard included, in seconds of',
        "one core, on a machine that did other work beside it. [How it works](developer/how-it-works.md#a-sampled-vocabulary) has the estimator.\n",
    ]
    groups = dict.fromkeys((entry["model"], tuple(entry["layers"]), entry["config"]["num_steps"]) for entry in found)
    for name, layers, steps in groups:
        of_group = [e for e in found if (e["model"], tuple(e["layers"]), e["config"]["num_steps"]) == (name, layers, steps)]
        entries = sorted(of_group, key=ids_of, reverse=True)
        full = next((float(np.mean(e["kl"])) for e in entries if ids_of(e) == e["tokens"]), None)
        tokens = f"{entries[0]['config']['warm_start_tokens']:,} + {steps * LENGTH:,} tokens"
        parts += [f"## {name}, {entries[0]['tokens']:,} ids: {tokens}\n", "| ids per step | mean KL | beside full | CPU time, s | "]
        parts[-1] += " | ".join(f"layer {layer}" for layer in layers) + " |"
        parts.append("|---:|---:|---:|---:|" + "---:|" * len(layers))
        for entry in entries:
            ids, mean = ids_of(entry), float(np.mean(entry["kl"]))
            shown = f"**{ids:,}**" if ids == sample_size("sampled", entry["tokens"]) else f"{ids:,}"
            beside = "" if full is None else f"{100 * (mean / full - 1):+.2f} %"
            cells = [shown, f"{mean:.4f}", beside, f"{entry['seconds']:.0f}", *(f"{kl:.4f}" for kl in entry["kl"])]
            parts.append("| " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    """Measure the runs that have no result yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME[=FOLDER]", help="models to measure; none = only write the page again")
    parser.add_argument("--layers", default="", help="layers to train [default: all]")
    parser.add_argument("--steps", type=int, default=120, help="steps of 128 tokens [default: %(default)s]")
    parser.add_argument("--sizes", default="1,full,0.5,2,0.25", help="sizes of the sample, in this order [default: %(default)s]")
    parser.add_argument("--fresh", action="store_true", help="discard earlier results")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs", help="folder of the page")
    arguments = parser.parse_args()
    if arguments.fresh:
        RESULTS.unlink(missing_ok=True)
    found = results()
    for given in arguments.models:
        name, _, source = given.partition("=")
        found = measure(name, source or name, arguments.layers, arguments.steps, arguments.sizes.split(","), found)
    (arguments.out / "sampled-vocabulary.md").write_text(page(found))


if __name__ == "__main__":
    main()
