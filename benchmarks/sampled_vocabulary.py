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
from benchmarks.targets import Target

from metalens import InterpretableModel
from metalens.models.bundled import TRAINING_TEXT
from metalens.training import TrainingConfig, recipe, train
from metalens.training.vocabulary import sample_size

RESULTS = Path(__file__).parent / "results" / "sampled_vocabulary.json"
WARM_START = 8192
HELD_OUT = 2048
WITHIN = 0.01  # what a sample may cost

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


def groups_of(found: list[Entry]) -> list[list[Entry]]:
    """Return the runs in groups that differ in the vocabulary only: those of a model, its layers and steps, the largest sample first."""
    groups: dict[Any, list[Entry]] = {}
    for entry in found:
        groups.setdefault((entry["model"], tuple(entry["layers"]), entry["config"]["num_steps"]), []).append(entry)
    ordered = [sorted(entries, key=ids_of, reverse=True) for entries in groups.values()]
    return sorted(ordered, key=lambda entries: entries[0]["tokens"])


def beside_full(entry: Entry, group: list[Entry]) -> float | None:
    """Return the mean KL of a run beside that of the full vocabulary, minus 1; None if the full one has not been run."""
    full = next((np.mean(other["kl"]) for other in group if ids_of(other) == other["tokens"]), None)
    return None if full is None else float(np.mean(entry["kl"]) / full - 1)


def targets(groups: list[list[Entry]]) -> list[Target]:
    """Return the verdict on the sample of "sampled" for every group that has it and the full vocabulary."""
    found = []
    for group in groups:
        for entry in group:
            beside = beside_full(entry, group)
            if ids_of(entry) == sample_size("sampled", entry["tokens"]) and beside is not None:
                wanted = (
                    f'{entry["model"]}: with equal tokens the sample of `vocabulary="sampled"` ends within {WITHIN:.0%} of the full vocabulary\'s KL'
                )
                found.append(Target(wanted, f"{beside:+z.2%} with {ids_of(entry):,} of {entry['tokens']:,} ids", beside <= WITHIN))
    return found


def page(found: list[Entry]) -> str:
    """Return docs/sampled-vocabulary.md."""
    groups = groups_of(found)
    parts = [
        "# Sampled vocabulary: what it costs in KL\n",
        f"KL(model || lens) in nats per token on {HELD_OUT:,} held-out tokens, always over the full vocabulary, after equal training but for",
        "`vocabulary`: the recipe `fast`, one sequence of 128 tokens a step. `python -m benchmarks.sampled_vocabulary` made this page from one run",
        'per line. In bold: the sample of `vocabulary="sampled"`. [How it works](developer/how-it-works.md#a-sampled-vocabulary) has the estimator,',
        "[Time to quality](time-to-quality.md) what the sample saves.\n",
        *map(str, targets(groups)),
        "",
        "| model | ids | ids per step: KL beside the full vocabulary |",
        "|---|---:|---|",
    ]
    for group in groups:
        cells = [
            f"{_ids(entry)}: {beside:+z.2%}"
            for entry in group
            if (beside := beside_full(entry, group)) is not None and ids_of(entry) < entry["tokens"]
        ]
        parts.append(f"| {group[0]['model']} | {group[0]['tokens']:,} | {' · '.join(cells)} |")
    parts.append("")
    for group in groups:
        first, config = group[0], group[0]["config"]
        tokens = f"{config['warm_start_tokens']:,} + {config['num_steps'] * LENGTH:,} tokens"
        parts.append(f"## {first['model']}, {first['tokens']:,} ids: {tokens}\n")
        parts.append("| ids per step | mean KL | beside full | " + " | ".join(f"layer {layer}" for layer in first["layers"]) + " |")
        parts.append("|---:|---:|---:|" + "---:|" * len(first["layers"]))
        for entry in group:
            beside = beside_full(entry, group)
            cells = [_ids(entry), f"{np.mean(entry['kl']):.4f}", "" if beside is None else f"{beside:+z.2%}", *(f"{kl:.4f}" for kl in entry["kl"])]
            parts.append("| " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _ids(entry: Entry) -> str:
    """Return the number of ids that a step compares, in bold for that of "sampled"."""
    ids = ids_of(entry)
    return f"**{ids:,}**" if ids == sample_size("sampled", entry["tokens"]) else f"{ids:,}"


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
