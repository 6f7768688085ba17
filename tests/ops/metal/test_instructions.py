"""Count the kernels' memory instructions by mslcpu's model: vectors, and no bank conflicts in threadgroup memory."""

from dataclasses import replace

import mlx.core as mx
import pytest

import mslcpu
from metalens.ops import lens_kl, lens_stats, lens_target, use_precision
from metalens.ops.metal import constants, source, tuning
from support import oracle
from support.metal_emulation import M1, M3, emulated, needs_clang


def test_sources_are_ascii():
    # MLX hands the source to Metal as an ASCII string; any other character makes it an empty one.
    for path in source.folder().glob("*.h"):
        assert path.read_bytes().isascii(), path.name


def counted(run, device=M1):
    with emulated(device), mslcpu.options(instructions=True), mslcpu.recording() as reports:
        mx.eval(run())
    return reports


def rows(rng, layers, tokens, depth):
    n_model = oracle.random_array(rng, tokens, depth)
    return n_model[None] + oracle.random_array(rng, layers, tokens, depth, scale=0.3), n_model


@needs_clang
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("device", "layers", "tokens"), [(M1, 3, 8), (M3, 7, 8), (M1, 2, 6), (M1, 3, 2)], ids=["m32", "m64", "m24", "few"])
def test_statistics_have_no_bank_conflicts(rng, device, layers, tokens, precision):
    head = oracle.make_head(rng, 128, 64)
    n, n_model = rows(rng, layers, tokens, 64)
    with use_precision(precision):
        reports = counted(lambda: vars(lens_stats(n, head, 3, n_model, mx.arange(tokens))), device)
    assert len(reports) == 3
    for report in reports:
        assert (report.threadgroup_stores.conflicts, report.threadgroup_loads.conflicts) == (0, 0), report.name


@needs_clang
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_has_no_bank_conflicts(rng, precision):
    head = oracle.make_head(rng, 128, 64)
    n, n_model = rows(rng, 3, 8, 64)
    with use_precision(precision):
        reports = counted(lambda: lens_kl(n, lens_target(n_model, head), head))
    assert sum("linear" in r.name or "backward" in r.name for r in reports) == 3
    for report in reports:
        assert (report.threadgroup_stores.conflicts, report.threadgroup_loads.conflicts) == (0, 0), report.name


@needs_clang
def test_a_product_reads_and_writes_vectors(rng):
    head, (n, n_model) = oracle.make_head(rng, 128, 64), rows(rng, 3, 8, 64)
    reports = counted(lambda: lens_kl(n, lens_target(n_model, head), head))
    linear = next(r for r in reports if "linear" in r.name and r.buffers["x"].unique_read == 24 * 64 * 4)
    backward = next(r for r in reports if "backward" in r.name)
    for report, buffer in ((linear, "x"), (backward, "g")):
        assert set(report.buffers[buffer].loads.widths) == {16}, report.name
    for report, buffer in ((linear, "y"), (backward, "dn")):
        assert set(report.buffers[buffer].stores.widths) == {16}, report.name
    assert set(linear.buffers["values"].loads.widths) == {4}  # eight codes of 4 bits
    # Operands go to threadgroup memory in 16 bytes, matrices of Z in 8. A step stores 32 x 32 of X, whose
    # last rows are zeros, and 64 x 32 of W, four floats a lane.
    steps = 2 * (64 // constants.TILE_DEPTH)  # two tiles of 64 ids
    assert linear.threadgroup_stores.widths[16] == steps * (32 * 32 + 64 * 32) // 4 // 32
    assert set(linear.threadgroup_stores.widths) == {8, 16}


@needs_clang
def test_few_rows_read_the_head_in_vectors(rng):
    head, (n, n_model) = oracle.make_head(rng, 64, 128), rows(rng, 3, 2, 128)
    report = next(r for r in counted(lambda: vars(lens_stats(n, head, 3, n_model))) if "vector" in r.name)
    # One instruction reads 32 columns in each of four lanes, of eight ids.
    assert report.buffers["values"].loads.widths == {16: 64 // 8}
    # An instruction whose lanes read both buffers counts for one of them.
    assert report.buffers["n"].loads.widths.keys() | report.buffers["n_model"].loads.widths.keys() == {16}


@needs_clang
def test_a_tile_costs_the_statistics_one_collective_of_each_simdgroup(rng, monkeypatch):
    n, n_model = rows(rng, 3, 8, 32)
    whole = oracle.make_head(rng, 64 * 6, 32, bias=True)
    whole.bias[64:] = -100.0  # the lists settle in the first tile
    collectives = []
    for tiles in (2, 6):
        monkeypatch.setattr(tuning, "split_vocab", lambda *_, tiles=tiles, **__: (64 * tiles, 1))
        head = replace(whole, used_rows=64 * tiles)
        reports = counted(lambda head=head: vars(lens_stats(n, head, 1, n_model)))
        collectives.append(next(r for r in reports if "lens_stats_float" in r.name).simd_ops)
    # Loads and stores of matrices count as collectives too: 4 of X and 2 of W for each 8 columns, and 8 of Z.
    matrices = 32 // 8 * (4 + 2) + 4 * 2
    assert collectives[1] - collectives[0] == constants.SIMDS * (6 - 2) * (matrices + 1)
