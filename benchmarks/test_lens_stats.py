"""lens_stats with everything on: top-10, entropy, KL and agreement with the model's rows, NLL and rank of labels; 4-bit head."""

import pytest
from benchmarks.competitor import OURS, OURS_BF16, PLAIN, TORCH, TORCH_BF16
from benchmarks.operations import lens
from benchmarks.operations.lens import Shape
from benchmarks.peaks import READ
from benchmarks.suite import Suite, Work

TITLE = "lens_stats: top-10, entropy, KL, NLL and rank, 8 layers"
ONE_ROW = "lens_stats of one row: bytes of the packed U per second"
SMALL = [Shape(256, 6000, 64), Shape(320, 6007, 64)]
LARGE = [Shape(320, 6007, 256), Shape(1024, 32000, 64), Shape(1024, 32000, 256), Shape(2048, 128256, 64)]
HUGE = Shape(2048, 128256, 256)


def label(shape: Shape) -> str:
    return f"D {shape.width}, V {shape.vocab}, {shape.rows} row{'s' if shape.rows > 1 else ''}"


def measure(suite: Suite, shape: Shape, ours: str, peers: list[str], title: str = TITLE, **settings) -> None:
    peak = suite.peaks.bf16 if ours == OURS_BF16 else None
    work = Work(shape.stats_flop, peak=peak) if peak else Work(shape.stats_flop)
    if title == ONE_ROW:
        work = Work(shape.packed_bytes, "B/s", READ)
    suite.measure(lens, {"operation": "stats"} | shape.to_dict(), [ours, *peers], label(shape), work, title=title, **settings)


@pytest.mark.parametrize("shape", SMALL, ids=label)
def test_small(suite, shape):
    measure(suite, shape, OURS, [TORCH, TORCH_BF16], memory_of=[OURS, TORCH, TORCH_BF16])


@pytest.mark.parametrize("shape", LARGE, ids=label)
def test_large(full_only, suite, shape):
    measure(suite, shape, OURS, [TORCH, TORCH_BF16], memory_of=[OURS, TORCH, TORCH_BF16])


def test_memory_of_the_largest(full_only, suite):
    """One round: this case is here for its memory."""
    measure(suite, HUGE, OURS, [TORCH, TORCH_BF16], memory_of=[OURS, TORCH, TORCH_BF16], limit=60, least_rounds=1, most_rounds=1)


@pytest.mark.parametrize("shape", SMALL + LARGE, ids=label)
def test_bf16(request, suite, shape):
    if shape in LARGE:
        request.getfixturevalue("full_only")
    measure(suite, shape, OURS_BF16, [OURS, TORCH_BF16], memory_of=[OURS_BF16])


@pytest.mark.parametrize("shape", [Shape(256, 6000, 1, 1), Shape(320, 6007, 1, 1), Shape(1024, 32000, 1, 1), Shape(2048, 128256, 1, 1)], ids=label)
def test_one_row(request, suite, shape):
    """A single row must read all of U: its bytes per second beside what memory can deliver. (A U that a cache holds may come faster than that.)

    The model's row is a second one, but U is to be read once for both.
    """
    if shape.width > 320:
        request.getfixturevalue("full_only")
    measure(suite, shape, OURS, [TORCH, TORCH_BF16], title=ONE_ROW, budget=6)


def test_beside_plain_mlx(suite):
    """Few rows, because MLX's matrix products are slow on Linux CPUs."""
    measure(suite, Shape(256, 6000, 8), OURS, [PLAIN], memory_of=[OURS, PLAIN])
