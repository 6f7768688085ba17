"""Test descriptors, sources, chunks and transformations of the Metal path."""

import re

import mlx.core as mx
import numpy as np
import pytest

import mslcpu
from metalens.ops import Head, Norm, Weight, lens_kl, lens_stats, lens_target, translate_norm, use_backend
from metalens.ops.backends import metal
from metalens.ops.metal import constants, descriptors, kernel, source, stats, tuning
from support import oracle
from support.metal_emulation import emulated, needs_clang


def test_headers_are_inlined_once_each():
    text = source.inlined("lens_stats.h")
    assert '#include "' not in text
    assert "#pragma once" not in text
    assert text.count("METAL_FUNC Slot slot_at(") == 1
    assert text.count("struct Affine {") == 1


def test_no_metal_text_lives_in_python():
    for path in (source.folder().parent / "python" / "metalens" / "ops" / "metal").glob("*.py"):
        assert not re.search(r"threadgroup_barrier|simd_sum|METAL_FUNC", path.read_text()), path.name


def test_a_problem_must_be_stated_whole():
    words = source.pack("linear.h", "LinearProblem", {"rows": 1, "depth": 2, "columns": 3, "with_bias": 0, "scale": 0.5})
    assert words[:4].tolist() == [1, 2, 3, 0]
    assert words[4:5].view(np.float32)[0] == 0.5
    assert words.size == 8
    with pytest.raises(KeyError, match="LinearProblem has the fields"):
        source.pack("linear.h", "LinearProblem", {"rows": 1})
    with pytest.raises(KeyError, match="no struct"):
        source.fields("linear.h", "Nothing")


@pytest.mark.parametrize(
    ("name", "header", "value"),
    [
        ("MAP_WIDTH", "common.h", constants.MAP_WIDTH),
        ("NORM_ROWS", "norm_grad.h", constants.NORM_ROWS),
        ("ROW_SIMDS", "row_group.h", constants.ROW_THREADS // 32),
        ("SIMDS", "common.h", constants.SIMDS),
        ("SIMDS", "common.h", constants.THREADS // 32),
        ("LANES", "common.h", constants.LANES),
        ("LANES", "common.h", stats.LARGEST_K),
        ("VECTOR_ROWS", "lens_stats_vector.h", constants.VECTOR_ROWS),
        ("VECTOR_SIMDS", "lens_stats_vector.h", constants.VECTOR_THREADS // 32),
        ("VECTOR_PASS", "lens_stats_vector.h", constants.TILE_IDS),
        ("FIELDS", "stats_rows.h", constants.FIELDS),
        ("TILE_IDS", "tile.h", constants.TILE_IDS),
        ("TILE_DEPTH", "tile.h", constants.TILE_DEPTH),
    ],
)
def test_constants_agree(name, header, value):
    (found,) = re.findall(rf"constexpr constant int {name} = (\d+);", source.inlined(header))
    assert int(found) == value
    with pytest.raises(KeyError, match="no constant"):
        source.constant(header, "NOTHING")
    assert not hasattr(constants, "NOTHING")


def test_the_backend_needs_a_gpu():
    with use_backend("metal"), pytest.raises(RuntimeError, match="MLX finds no Metal GPU"):
        metal()
    with use_backend("auto"):
        assert not metal()


@needs_clang
def test_one_kernel_for_one_descriptor(rng):
    kernel._just_in_time.cache_clear()
    head = oracle.make_head(rng, 131, 64)
    with emulated():
        for tokens in (9, 10, 12):
            mx.eval(lens_stats(oracle.random_array(rng, 1, tokens, 64), head).lse)
    assert kernel._just_in_time.cache_info().currsize == 2  # the kernel for blocks of eight rows, and the one that merges the splits


def test_planning_reads_no_values():
    # mx.compile traces with arrays that have no values, so a launch that reads values cannot be compiled.
    def stand_in(**_):
        def run(inputs, output_shapes, output_dtypes, **_):
            total = sum(mx.sum(a.astype(mx.float32)) for a in inputs)
            return [mx.zeros(s, d) + total.astype(d) * 0 for s, d in zip(output_shapes, output_dtypes, strict=True)]

        return run

    rng = np.random.default_rng(0)
    head, norm = oracle.make_head(rng, 131, 64), Norm(lambda y: y, "rms", mx.ones(64), None, 1e-5)

    def everything(h, w, b, labels):
        n = translate_norm(h, w, b, norm)
        kl, _ = lens_kl(n[None], lens_target(n, head), head)
        return mx.sum(kl), lens_stats(n[None], head, 3, n, labels).nll

    arguments = [oracle.random_array(rng, 20, 64), mx.eye(64), mx.zeros(64), mx.arange(20)]
    try:
        with kernel.emulation(stand_in), use_backend("metal"):
            compiled = mx.compile(everything)
            mx.eval(compiled(*arguments), compiled(*arguments))
            mx.eval(mx.compile(mx.grad(lambda *a: everything(*a)[0], argnums=(0, 1, 2)))(*arguments))
    finally:
        kernel._just_in_time.cache_clear()


@needs_clang
def test_the_kl_is_differentiable_through_translator_and_norm(rng):
    head, norm = oracle.make_head(rng, 131, 64), Norm(lambda y: y, "rms", 1 + 0.1 * oracle.random_array(rng, 64), None, 1e-5)
    h, w, b = oracle.random_array(rng, 5, 64), mx.eye(64) + 0.1 * oracle.random_array(rng, 64, 64), 0.1 * oracle.random_array(rng, 64)
    n_model = oracle.random_array(rng, 5, 64)

    def loss(h, w, b):
        kl, _ = lens_kl(translate_norm(h, w, b, norm)[None], lens_target(n_model, head), head)
        return mx.sum(kl * mx.arange(1, 6))

    with use_backend("reference"):
        expected = mx.value_and_grad(loss, argnums=(0, 1, 2))(h, w, b)
    with emulated():
        found = mx.value_and_grad(loss, argnums=(0, 1, 2))(h, w, b)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(oracle.wide(ours), oracle.wide(theirs), rtol=1e-4, atol=1e-5)


@needs_clang
@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
@pytest.mark.parametrize("rows", [2, 3, 7])
def test_chunks_change_nothing(rng, monkeypatch, settings, rows):
    head = oracle.make_head(rng, 131, 64, **settings)
    n_model = oracle.random_array(rng, 5, 64)
    n = n_model[None] + oracle.random_array(rng, 4, 5, 64, scale=0.3)
    with emulated():
        whole = [*lens_kl(n, lens_target(n_model, head), head), *oracle.present(lens_stats(n, head, 3, n_model, mx.arange(5))).values()]
        monkeypatch.setattr(tuning, "rows_per_dispatch", lambda *_: rows)
        with mslcpu.recording() as reports:
            parts = [*lens_kl(n, lens_target(n_model, head), head), *oracle.present(lens_stats(n, head, 3, n_model, mx.arange(5))).values()]
    assert sum("lens_softmax_grad" in r.name for r in reports) >= 20 // rows
    for ours, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(oracle.wide(ours), oracle.wide(expected), atol=3e-6)


@needs_clang
def test_every_launch_gives_the_same_bits(rng):
    head = oracle.make_head(rng, 515, 64, bias=True)
    n_model = oracle.random_array(rng, 5, 64)
    n = n_model[None] + oracle.random_array(rng, 4, 5, 64, scale=0.3)
    results = []
    for schedule in mslcpu.SCHEDULES:
        with emulated(), mslcpu.options(schedule=schedule, seed=1):
            found = [*lens_kl(n, lens_target(n_model, head), head), *oracle.present(lens_stats(n, head, 5, n_model, mx.arange(5))).values()]
            results.append([np.array(a).tobytes() for a in found])
    assert all(r == results[0] for r in results[1:])


@needs_clang
@pytest.mark.parametrize("settings", [{"bias": True}, {"softcap": 6.0}, {"bias": True, "padding": 17}], ids=["linear", "softcap", "padding"])
def test_vocabulary_beyond_16_bits(rng, settings):
    head = oracle.make_head(rng, 70_001, 32, **settings)
    n_model = oracle.random_array(rng, 3, 32)
    n = n_model[None] + oracle.random_array(rng, 3, 3, 32, scale=0.3)
    labels = mx.array([0, 69_000, 65_537])
    with emulated(), mslcpu.options(checked=False):
        found = lens_stats(n, head, 32, n_model, labels)
        kl, dn = lens_kl(n, lens_target(n_model, head), head)
    z = oracle.head_logits(oracle.wide(n), head)
    np.testing.assert_array_equal(np.array(found.top_ids), np.argsort(-z, axis=-1, kind="stable")[..., :32])
    of_label = np.take_along_axis(z, np.array(labels)[None, :, None].repeat(3, 0), axis=-1)
    np.testing.assert_array_equal(np.array(found.rank), 1 + np.sum(z > of_label, axis=-1))
    expected = oracle.lens_kl(n, n_model, head)
    np.testing.assert_allclose(oracle.wide(found.kl), expected[0], atol=5e-6)
    np.testing.assert_allclose(oracle.wide(kl), expected[0], rtol=1e-5)
    assert oracle.row_errors(dn, expected[1]).max() < 1e-5


@needs_clang
def test_logits_beyond_2_to_the_31(rng):
    """The last rows of a chunk of 16,800 x 128,001 logits lie past element 2^31. The kernel reads 64 ids of each row, a few pages of 8.6 GB."""
    vocab, rows = 128_001, 16_800
    descriptor = descriptors.lens_backward(mx.float32, _dense(), 8)
    assert rows * vocab > 2**31
    # The map is zero except in the last row, so every other tile is skipped.
    g = np.zeros((rows, vocab), np.float32)  # pages that are never touched take no memory
    g[-1, 5], g[-1, 60] = 1.0, -2.0
    map_columns = -(-vocab // 32)
    tile_absmax = np.zeros((rows, map_columns), np.float32)
    tile_absmax[-1, 0], tile_absmax[-1, 1] = 1.0, 2.0
    row_l1 = np.ones(rows, np.float32)
    u = oracle.random_array(rng, 64, 8)
    problem = {"rows": rows, "width": vocab, "vocab": 64, "columns": 8, "ids_per_split": 64, "negligible": 2.0**-24, "scale": 1.0}
    run = mslcpu.metal_kernel(
        name=descriptor.name,
        input_names=[a.name for a in descriptor.inputs],
        output_names=[a.name for a in descriptor.outputs],
        source=descriptor.body,
        header=source.inlined(descriptor.header),
    )
    with mslcpu.options(checked=False):
        (dn,) = run(
            inputs=[g, tile_absmax, row_l1, u, u, u, mx.array(source.pack("lens_backward.h", "LensBackwardProblem", problem))],
            grid=(128 * (rows // 8), 1, 1),
            threadgroup=(128, 1, 1),
            output_shapes=[(1, rows, 8)],
            output_dtypes=[mx.float32],
        )
    expected = oracle.wide(u)[5] - 2 * oracle.wide(u)[60]
    np.testing.assert_allclose(oracle.wide(dn)[0, -1], expected, rtol=1e-6)
    assert not np.any(np.array(dn)[0, :-1])


def _dense():
    from metalens.ops.metal.formats import format_of

    return format_of(Weight(mx.zeros((8, 8))))


@needs_clang
def test_a_head_that_the_kernels_do_not_read_runs_in_plain_mlx(rng):
    w = oracle.random_array(rng, 131, 64)
    head = Head(Weight(*mx.quantize(w, 64, 4), 64, 4, "affine"))
    wide = Head(Weight(head.weight.values, head.weight.scales.astype(mx.float16), head.weight.biases, 64, 4))  # scales and biases of two types
    n = oracle.random_array(rng, 2, 3, 64)
    with emulated(), mslcpu.recording() as reports:
        mx.eval(lens_stats(n, wide).lse)
        assert not reports
        mx.eval(lens_stats(n, head, 33).lse)  # more than a simdgroup has lanes
        assert not reports
