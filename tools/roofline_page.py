"""Write docs/roofline.md: the bounds that `metalens roofline` gives for the models that it knows by name.

With --check, fail if the file is not what would be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from metalens.display.tables import ROOFLINE_LABELS
from metalens.estimate.roofline import CHIPS, bounds
from metalens.models.facts import KNOWN_MODELS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "roofline.md"
SHOWN = ("M1", "M1-Max", "M2-Max", "M2-Ultra", "M3-Max", "M4-Max", "M5-Max")

HEAD = """# How fast a lens could be on Apple GPUs

**A model, not a measurement.** Nothing of metalens has run on Apple hardware. These are upper bounds of tokens per second, from the matrix operations
and bytes that the kernels were counted to need in emulation (`tests/metal/test_traffic.py` holds the formulas of `python/metalens/ops/metal/cost.py`
against the counts) and from published numbers of the chips. A kernel takes the longer of two times: operations at the rate of simdgroup matrices
(80 % of the float32 peak), bytes at the memory's bandwidth. Real kernels reach some part of that: others report 40 to 75 % of the peak for MLX's own
quantized products on these chips.

`plain MLX` is the same mathematics written well without fused kernels: one batched product for all layers and chunks of tokens, float32 logits,
gradients layer by layer; its products are taken as free of any padding. What fusing saves is what goes over the memory's bus between the products, so
the gain is larger for small models, and memory and exactness are the better reasons. The M5's matrix units are not counted: there are no kernels for
them yet.

Every layer of every token, batches of {tokens} tokens, 4-bit weights in groups of 64. Written by `tools/roofline_page.py`; for other models and
chips: `metalens roofline MODEL --chip M2-Max`.
"""


def page(tokens: int = 512) -> str:
    """Return the whole page."""
    parts = [HEAD.format(tokens=tokens)]
    for name, model in KNOWN_MODELS.items():
        found = {chip: bounds(model, CHIPS[chip], tokens) for chip in SHOWN}
        parts.append(f"## {name}\n\n| tokens/s at most | {' | '.join(SHOWN)} |\n|---|{'---:|' * len(SHOWN)}")
        for task, label in ROOFLINE_LABELS.items():
            parts.append(f"| {label} | {' | '.join(f'{getattr(found[chip], task):.3g}' for chip in SHOWN)} |")
        one = {chip: bounds(model, CHIPS[chip], 1).statistics for chip in SHOWN}
        parts.append(f"| statistics of one token at a time | {' | '.join(f'{one[chip]:.3g}' for chip in SHOWN)} |\n")
    sources = "\n".join(f"* {name}: {chip.tflops} TFLOP/s, {chip.bandwidth:g} GB/s ({chip.source})" for name, chip in CHIPS.items())
    return "\n".join(parts) + f"\n## The chips' numbers\n\n{sources}\n"


def main() -> None:
    """Write the page, or compare it with the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if PAGE.read_text() != page():
            sys.exit(f"{PAGE} is out of date: run python tools/roofline_page.py")
    else:
        PAGE.write_text(page())


if __name__ == "__main__":
    main()
