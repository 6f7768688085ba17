"""Write docs/models.md from assets/models.json.

With --examine, first write assets/models.json: examine a tiny model of every architecture (tests/zoo, a minute).
With --check, fail if the page is out of date. tests/models/test_zoo.py tests whether models.json is true.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from metalens.models.support import TABLE, counts, installed, remark, supported_modules, tested

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"

# Of 97 modules of an earlier mlx-lm, read with mlxterp 0.1 by the same standard: last layer's logits, a lens, a training step.
MLXTERP = {"right": 64, "refused": 21, "wrong, with a warning": 8, "wrong, without": 6}

HEAD = """# Which models a lens can read

`metalens models` prints this table for the installed mlx-lm. It comes from the tests: for every module of mlx-lm {version} and its
variants (tied and untied heads, softcaps, scales, biases, other norms: {variants} in all) `tests/zoo` builds a tiny random model, and
`tests/models/test_zoo.py` requires

* that norm and head, found by observing the model, give its own logits from its last block's output;
* that a capture of all blocks' outputs does not change a bit of the logits, and leaves the model's classes as they were;
* that the logit lens of the last layer is the model's prediction, and one training step lowers the loss of a tuned lens;
* that chunks of a sequence, with the model's own cache, give the hidden states of the whole (float32);
* the same after mlx-lm's own quantization to 4 bits, and in bfloat16.

**Right** means all of that. **Refused** models raise `UnembedError` with the reason. Whatever the table says, every model passes the first check
before a lens is trained or shown on it.

{counts}

For comparison: by the first of these requirements, mlxterp 0.1 was {mlxterp}, of the 97 modules of an earlier mlx-lm.
"""

FOOT = """
`mlx-lm: ...` is an error of mlx-lm's own forward pass or quantization, without metalens. MLX's CPU backend supports products with gathered
experts (GatherMM) in float32 only; a GPU supports them in other types too. plamo3 gives other logits with its own cache than without.
"""


def page() -> str:
    """Return the whole page."""
    version, results = tested()
    found = supported_modules()
    counted = counts(found)
    modules = sum(counted.values())
    lines = [
        HEAD.format(
            version=version,
            variants=len(results),
            counts=f"Of {modules} modules: " + ", ".join(f"**{n} {status}**" for status, n in counted.items()) + ".",
            mlxterp="; ".join(f"{status} on {n}" for status, n in MLXTERP.items()),
        ),
        "| module | variants | a lens | remark |",
        "|---|---:|---|---|",
    ]
    lines += [f"| {m.name} | {len(m.variants)} | {m.status} | {remark(m).replace('|', '/')} |" for m in found]
    return "\n".join(lines) + "\n" + FOOT


def main() -> None:
    """Read the arguments, then write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--examine", action="store_true")
    arguments = parser.parse_args()
    if arguments.examine:
        examine_all()
    if not arguments.check:
        PAGE.write_text(page())
    elif PAGE.read_text() != page():
        sys.exit(f"{PAGE} is out of date: run python tools/models_page.py")


def examine_all() -> None:
    """Write the table into the sources, and into the installed package, from which the page is made."""
    sys.path.insert(0, str(ROOT / "tests"))
    from zoo import CONFIGS
    from zoo.verdict import examine

    table = json.dumps({"mlx_lm": installed(), "models": {label: examine(label).as_dict() for label in sorted(CONFIGS)}}, indent=1) + "\n"
    for file in (ROOT / "python" / "metalens" / "assets" / "models.json", TABLE):
        file.write_text(table)


if __name__ == "__main__":
    main()
