"""Write docs/roofline.md: the bounds that `metalens roofline` gives for the models that it knows by name.

With --check, fail if the file is not what would be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from metalens.display.tables import KERNEL_LABELS, ROOFLINE_LABELS, fraction_text
from metalens.estimate.chips import CHIPS
from metalens.estimate.kernel_model import FIRST, fractions, mlx_in_float16, tensor_speedups
from metalens.estimate.roofline import bounds
from metalens.models.facts import KNOWN_MODELS
from metalens.ops.metal.speed import NOW

PAGE = Path(__file__).resolve().parent.parent / "docs" / "roofline.md"
SHOWN = ("M1", "M1-Max", "M2-Max", "M2-Ultra", "M3-Max", "M4-Max", "M5-Max")

HEAD = """# How fast a lens could be on Apple GPUs

**A model, not a measurement.** Nothing of metalens has run on Apple hardware. The first tables are upper bounds of tokens per second, from the matrix
operations and bytes that the kernels were counted to need in emulation (`tests/ops/metal/test_traffic.py` holds the formulas of
`python/metalens/ops/metal/cost.py` against the counts) and from published numbers of the chips. A kernel takes the longer of two times: operations at
the rate of simdgroup matrices, bytes at the memory's bandwidth. That rate is 80 % of the float32 peak on M1 and M2, as measured on M1, and 94 % from
M3 on, the most that others reached there. The last tables predict which part of the peak the kernels reach.

`plain MLX` is the same mathematics written well without fused kernels: one batched product for all layers and chunks of tokens, float32 logits,
gradients layer by layer; its products are taken as free of any padding. What fusing saves is what goes over the memory's bus between the products, so
the gain is larger for small models, and memory and exactness are the better reasons.

**M5.** Its matrix units multiply 16-bit operands four times as fast. MLX also uses them for float32, after rounding operands to 11 bits (TF32). The
lines of training and statistics are in float32, which means `MLX_ENABLE_TF32=0` for plain MLX: then both sides multiply with simdgroup matrices.
"With 16-bit operands" (`--precision bfloat16`) is on the matrix units, through MLX's own products; so is the model's forward pass.

Every layer of every token, batches of {tokens} tokens, 4-bit weights in groups of 64. Written by `tools/roofline_page.py`; for other models and
chips: `metalens roofline MODEL --chip M2-Max`.
"""

PARTS = """## What part of the peak the kernels reach

A prediction too (`python/metalens/ops/metal/speed.py`, `python/metalens/estimate/kernel_model.py`): percent of the float32 peak, for useful
operations only, as **first design of the kernels > now (plain MLX)**. Plain MLX is modelled in the same way, in the chunks of metalens's reference,
in float32.

A tile's step of 32 columns costs a simdgroup its matrix products, the dequantization of its part of U, and its use of the core's threadgroup memory;
the three add up. To that come the statistics of each row and 32 ids, padding, and cores that have no work. The cycles of instructions are those of
[metal-benchmarks](https://github.com/philipturner/metal-benchmarks) for M1 and M2. That threadgroup memory has 32 banks of 4 bytes is an assumption.

| | first design | now |
|---|---:|---:|
| bank conflicts of a store to threadgroup memory | {first.conflicts}-fold | none |
| cycles to dequantize a 4-bit weight | {first.dequantize} | {now.dequantize} |
| cycles of the statistics of 32 ids of a row | {first.epilogue} | {now.epilogue} |
| threadgroups of the statistics | one wave, for the fewest cores of the GPU's name | three waves or more, for the cores that there are |
| logits of labels | in every split of the vocabulary | in a kernel of their own |
| at most 16 rows | sums over lanes for each id | matrix operations |

The model is pessimistic. For MLX's 4-bit product of float16 rows on an M1 Max it says {mlx:.0%} of the peak, and 74 % was published
([ml-explore/mlx#4216](https://github.com/ml-explore/mlx/issues/4216)). So compare columns, and do not take them for speeds.

**No call takes more than 1.01 of the time of plain MLX** in this model. Where plain MLX takes less time, backend `auto` computes the
statistics with it, and few rows are multiplied by MLX's product. The decision knows a chip by its generation and its number of cores.
`tests/estimate/test_kernel_model.py` compares statistics, losses and comparisons with plain MLX by the published numbers of each chip: all
chips here, models that fit them, 1 to 80 layers, 1 to 512 tokens, with and without labels. Plain MLX is charged for what it does: for
several top tokens it sorts all logits, and it makes 16-bit scales float32 before a product.
"""


TENSORS = """## Tiles of tensor operations on an M5

The kernels can multiply on an M5's matrix units in float32 (`METALENS_METAL_TILES=tensor`, `metal/tensor_tile.h`). They do not by default,
because it could not be timed. The model adds up, for 32 columns of a tile: two products of halves at {rate} operations per core and clock,
the division of numbers into halves, the unpacking of codes, the factors of the sums, and threadgroup memory. Time with simdgroup matrices,
divided by that with tensor operations:

| | {names} |
|---|{columns}
"""
WITH_UNITS = ("M5", "M5-Max")


def tensor_table(tokens: int) -> str:
    """Return the part of the page about tiles of tensor operations."""
    rows = []
    for name, model in KNOWN_MODELS.items():
        found = {chip: tensor_speedups(model, CHIPS[chip], tokens) for chip in WITH_UNITS}
        for kernel in ("lens_stats", "linear"):
            rows.append(f"| {name}, {KERNEL_LABELS[kernel]} | {' | '.join(f'{found[chip][kernel]:.2f}' for chip in WITH_UNITS)} |")
    rate = round(CHIPS["M5"].matrix_tflops * 1e12 / CHIPS["M5"].clock / CHIPS["M5"].cores)
    return TENSORS.format(rate=rate, names=" | ".join(WITH_UNITS), columns="---:|" * len(WITH_UNITS)) + "\n".join(rows) + "\n"


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
    parts.append(PARTS.format(first=FIRST, now=NOW, mlx=mlx_in_float16(CHIPS["M1-Max"].rates)))
    for name, model in KNOWN_MODELS.items():
        found_parts = {chip: fractions(model, CHIPS[chip], tokens) for chip in SHOWN}
        parts.append(f"### {name}\n\n| percent of the peak | {' | '.join(SHOWN)} |\n|---|{'---:|' * len(SHOWN)}")
        for kernel, label in KERNEL_LABELS.items():
            parts.append(f"| {label} | {' | '.join(fraction_text(found_parts[chip][kernel]) for chip in SHOWN)} |")
        parts.append("")
    parts.append(tensor_table(tokens))
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
