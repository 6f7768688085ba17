"""Kill the commands that write files, fill their disk, flip bits in their files, and run them twice at once. Write what came of it as a page.

    python tools/hard_life [--jobs train eval ...] [--kinds killed ...] [--moments 40] [--flips 100] [--rounds 4]

Every command first writes an older version of its files without trouble. Then it is killed before the changes that it makes to files while it writes
a newer one, and so on. Each file must be the older or the newer one, and the next run must write what one run alone writes. Exits with 1 if something
is otherwise. The trials of a command are saved in benchmarks/results/hard_life.json as they are made, so that this can be interrupted and continued;
--fresh starts again. The page is docs/reference/hard-life.md.

Takes Linux, and root to mount small disks: without it, `unshare --user --map-root-user --mount` before the command.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests"), str(ROOT / "python")]

from hard_life import bits, trials  # noqa: E402
from hard_life.jobs import JOBS, Job, prepare  # noqa: E402
from hard_life.page import KINDS, page  # noqa: E402
from hard_life.trials import Bench, Found  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "hard_life.json", ROOT / "docs" / "reference" / "hard-life.md"

# Imported before the forks, so that no process imports them again. None of them uses MLX while it is imported.
SLOW = (
    "click",
    "gguf",
    "matplotlib.figure",
    "metalens.cli",
    "metalens.training",
    "mlx_lm",
    "rich.console",
    "tqdm",
    "transformers",
)


def main() -> None:
    """Make the trials that have no result yet, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--jobs", nargs="*", default=[job.name for job in JOBS], choices=[job.name for job in JOBS], help="none = only write the page"
    )
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--moments", type=int, default=40, help="most kills of a command")
    parser.add_argument("--flips", type=int, default=100, help="flipped bits of a file")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of two commands at once")
    parser.add_argument("--fresh", action="store_true", help="discard earlier results")
    arguments = parser.parse_args()
    found: dict[str, dict[str, Found]] = {} if arguments.fresh or not RESULTS.exists() else read(RESULTS)
    for name in SLOW:
        importlib.import_module(name)
    scratch = Path(tempfile.mkdtemp(prefix="hard-life-"))
    try:
        bench = Bench(scratch, prepare)
        for job in JOBS:
            kinds = [kind for kind in arguments.kinds if job.name in arguments.jobs and kind not in found.get(job.name, {})]
            if kinds:
                bench.learn(job)
            for kind in kinds:
                result = TRIALS[kind](bench, job, arguments)
                sys.stderr.write("\n  ".join([f"{job.name}, {kind}: {result.trials} trials, {len(result.wrong)} wrong", *result.wrong]) + "\n")
                found.setdefault(job.name, {})[kind] = result
                RESULTS.write_text(
                    json.dumps({name: {k: r.to_dict() for k, r in by_kind.items()} for name, by_kind in found.items()}, indent=1) + "\n"
                )
    finally:
        shutil.rmtree(scratch)
    PAGE.write_text(page(found))
    sys.exit(any(result.wrong for by_kind in found.values() for result in by_kind.values()))


def read(file: Path) -> dict[str, dict[str, Found]]:
    """Return the results of earlier trials, by job and kind."""
    return {job: {kind: Found.from_dict(result) for kind, result in kinds.items()} for job, kinds in json.loads(file.read_text()).items()}


# {kind of trial: function of bench, job and arguments}
TRIALS: dict[str, Callable[[Bench, Job, argparse.Namespace], Found]] = {
    "killed": lambda bench, job, arguments: trials.killed(bench, job, arguments.moments),
    "full disk": lambda bench, job, _: trials.full_disk(bench, job),
    "two at once": lambda bench, job, arguments: trials.twice(bench, job, arguments.rounds),
    "a flipped bit": lambda bench, job, arguments: bits.flipped(bench, job, arguments.flips),
}


if __name__ == "__main__":
    main()
