"""From nothing to a lens as good as the paper's recipe ends with: core seconds of metalens, of PyTorch and of plain MLX.

    python -m benchmarks.time_to_quality [--models demo smollm2] [--rounds 3] [--former PYTHON] [--out docs]

The mark is the held-out KL that the recipe `paper` reaches with 409,600 tokens (benchmarks/results/recipes.json; `python -m benchmarks.recipes
--lines paper --variants long` measures it). metalens reaches it with `ridge` or `fast` and as few tokens as a search over budgets finds. Each is a
real run: from text to lens, then read on held-out text. So are the runs with the settings of version 0.1.0 and the full vocabulary, and, with
--former, those of that version itself. PYTHON is one in which it is installed; the page says how.

The others would take hours, so the command measures the core seconds of steps of theirs and multiplies by tokens:

 * PyTorch, the paper's recipe as upstream's tuned-lens runs it (benchmarks/torch_lens.py), for all 409,600 tokens;
 * plain MLX, written well (every layer's own backward pass, one batched call of the head), for the tokens of metalens's own run.

What the page compares is measured on one machine, one core, in rounds: metalens, the others, metalens, ... Every measurement is a process of its own
and is saved in benchmarks/results/time_to_quality.json, so that the command can be interrupted and continued; --fresh starts again. It then
writes docs/time-to-quality.md and its picture.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks.recipes.cases import MODELS
from benchmarks.recipes.select import mean
from benchmarks.time_to_quality import page, picture
from benchmarks.time_to_quality.search import Results, equal_time, explore, headline, mark_of
from benchmarks.time_to_quality.visits import FORMER_VERSION, FORMERS, ROOT, STEP_COST, THREADS, Measured, Visit, visit

COMPARISON, RESULTS = (ROOT / "benchmarks" / "results" / name for name in ("recipes.json", "time_to_quality.json"))
DEFAULT = ("demo", "small", "smollm2")


def machine() -> dict[str, Any]:
    """Describe the machine: figures of two machines must not stand side by side."""
    from metalens import _extension

    extension, reason = _extension.find()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "kernels": extension.isa() if extension is not None else reason,
        "cores": len(os.sched_getaffinity(0)),
        "threads": THREADS,
    }


def main() -> None:
    """Make the visits that have no result yet, then write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=DEFAULT, choices=list(MODELS), help="none = only write the page again")
    parser.add_argument("--rounds", type=int, default=3, help="rounds [default: %(default)s]")
    parser.add_argument("--step-cost", nargs="*", default=[], choices=list(MODELS), help="models to measure a step beside a forward pass of only")
    parser.add_argument("--equal-time", nargs="*", default=[], choices=list(MODELS), help="models to compare vocabularies at equal time of only")
    parser.add_argument("--former", metavar="PYTHON", help=f"a Python in which {FORMER_VERSION} is installed, to run it too")
    parser.add_argument("--fresh", action="store_true", help="discard earlier results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the page and the picture")
    arguments = parser.parse_args()
    if arguments.fresh:
        RESULTS.unlink(missing_ok=True)
    results, here = Results(RESULTS), machine()
    if results.machine not in ({}, here):
        parser.error(f"{RESULTS.name} has figures of another machine ({results.machine}, this is {here}). Start again with --fresh.")
    results.machine = here
    comparison = json.loads(COMPARISON.read_text())

    def again(wanted: Visit) -> Measured:
        found = visit(wanted, arguments.former)
        kl = f", KL {mean(found.kl):.4f}" if found.kl else ""
        sys.stderr.write(f"{wanted.model}, {wanted.key}: {found.seconds:.4g} core seconds{kl}\n")
        return results.add(wanted, found)

    def once(wanted: Visit) -> Measured:
        return results.get(wanted) or again(wanted)

    for model in arguments.models:
        mark = mark_of(model, comparison)
        if mark is None:
            sys.stderr.write(f"{model}: the recipe `paper` has not been run on its whole budget, so there is no mark.\n")
            continue
        explore(model, mark, once, with_former=arguments.former is not None)
        for turn in range(1, arguments.rounds + 1):
            for wanted in headline(results, model, mark):
                if wanted.name in FORMERS and arguments.former is None:
                    continue
                known = results.get(wanted)
                if known is None or len(known.core_seconds) < turn:
                    again(wanted)
    for model in arguments.step_cost:
        once(Visit(model, STEP_COST))
    for model in arguments.equal_time:
        equal_time(model, once)
    (arguments.out / "time-to-quality.md").write_text(page.page(results, comparison))
    picture.draw(results, comparison, arguments.out / "time-to-quality.png")


if __name__ == "__main__":
    main()
