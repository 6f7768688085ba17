"""Time lens_stats with all its results on a 4-bit head: top-10, entropy, KL and agreement with the model, NLL and rank of labels."""

import pytest
from benchmarks.competitor import OURS, OURS_BF16, PLAIN, TORCH, TORCH_BF16
from benchmarks.operations import lens
from benchmarks.operations.lens import Shape
from benchmarks.peaks import READ
from benchmarks.suite import Case, Effort, Suite, Work

TITLE = "lens_stats: top-10, entropy, KL, NLL and rank, 8 layers"
ONE_ROW = "lens_stats of one row: bytes of the packed U per second"
SMALL = [Shape(256, 6000, 64), Shape(320, 6007, 64)]
LARGE = [Shape(320, 6007, 256), Shape(1024, 32000, 64), Shape(1024, 32000, 256), Shape(2048, 128256, 64)]
HUGE = Shape(2048, 128256, 256)


def label(shape: Shape) -> str:
    return f"D {shape.hidden_size}, V {shape.vocab_size}, {shape.rows} row{'s' if shape.rows > 1 else ''}"


def measure(suite: Suite, shape: Shape, ours: str, peers: list[str], memory_of: list[str], effort: Effort | None = None) -> None:
    peak = suite.peaks.bf16 if ours == OURS_BF16 else None
    work = Work(shape.stats_flop, peak=peak) if peak else Work(shape.stats_flop)
    arguments = {"operation": "stats"} | shape.to_dict()
    suite.measure(Case(lens, arguments, [ours, *peers], TITLE, label(shape), work, memory_of=memory_of), effort)


@pytest.mark.parametrize("shape", SMALL, ids=label)
def test_small(suite, shape):
    measure(suite, shape, OURS, [TORCH, TORCH_BF16], memory_of=[OURS, TORCH, TORCH_BF16])


@pytest.mark.parametrize("shape", LARGE, ids=label)
def test_large(full_only, suite, shape):
    measure(suite, shape, OURS, [TORCH, TORCH_BF16], memory_of=[OURS, TORCH, TORCH_BF16])


def test_memory_of_the_largest(full_only, suite):
    """Run a single round, because this case is here for its memory."""
    one_round = Effort(limit=60, least_rounds=1, most_rounds=1)
    measure(suite, HUGE, OURS, [TORCH, TORCH_BF16], memory_of=[OURS, TORCH, TORCH_BF16], effort=one_round)


@pytest.mark.parametrize("shape", SMALL + LARGE, ids=label)
def test_bf16(request, suite, shape):
    if shape in LARGE:
        request.getfixturevalue("full_only")
    measure(suite, shape, OURS_BF16, [OURS, TORCH_BF16], memory_of=[OURS_BF16])


@pytest.mark.parametrize("shape", [Shape(256, 6000, 1, 1), Shape(320, 6007, 1, 1), Shape(1024, 32000, 1, 1), Shape(2048, 128256, 1, 1)], ids=label)
def test_one_row(request, suite, shape):
    """Compare the bytes per second of a single row, which must read all of U, with the speed of memory.

    A U that fits into a cache may be read faster than that. The model's row is a second row, but U should be read once for both.
    """
    if shape.hidden_size > 320:
        request.getfixturevalue("full_only")
    arguments, work = {"operation": "stats"} | shape.to_dict(), Work(shape.packed_bytes, "B/s", READ)
    suite.measure(Case(lens, arguments, [OURS, TORCH, TORCH_BF16], ONE_ROW, label(shape), work), Effort(budget=6))


def test_beside_plain_mlx(suite):
    """Use few rows, because MLX's matrix products are slow on Linux CPUs."""
    measure(suite, Shape(256, 6000, 8), OURS, [PLAIN], memory_of=[OURS, PLAIN])
