"""Run cases of one model and seed: `python -m benchmarks.paper.measure CASES` prints a line of JSON for each."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from benchmarks.paper.experiments import EXPERIMENTS
from benchmarks.paper.subjects import MODELS, Subject

import metalens
from metalens.utils.errors import MissingPackageError


def main(cases: list[dict[str, Any]]) -> None:
    """Run the cases, the lens's training first, and write each result when it is there."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no result
    subject = Subject(MODELS[cases[0]["model"]], cases[0]["seed"])
    _ = subject.lens
    for case in cases:
        used = time.process_time()
        try:
            result = EXPERIMENTS[case["experiment"]].run(subject)
        except MissingPackageError as error:
            sys.stderr.write(f"{case['model']} seed {case['seed']} {case['experiment']}: left out. {error}\n")
            continue
        entry = {"case": case, "metalens": metalens.__version__, "core_seconds": round(time.process_time() - used, 1), "result": result}
        answers.write(json.dumps(entry) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
