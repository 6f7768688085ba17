"""Test the kernels with tiles of tensor operations: values, the bound of their error, the counted operations, and that they run only if asked for."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import mslcpu
from metalens.ops import Head, Weight, lens_stats, use_precision
from metalens.ops.metal import cost, descriptors, matmul, source, tuning
from metalens.ops.metal import kernel as metal_kernel
from metalens.ops.metal.formats import arrays, format_of
from metalens.ops.metal.kernel import absent, launch
from metalens.utils.errors import InvalidValueError, UnavailableError
from support import metal_cells as cells
from support import oracle
from support.metal_emulation import M5, emulated, needs_clang

pytestmark = needs_clang

CELLS = cells.tensor_cells()


@pytest.mark.parametrize(("number", "cell"), list(enumerate(CELLS)), ids=map(str, CELLS))
def test_cell(number, cell):
    """Each cell in one of the four orders."""
    order = mslcpu.SCHEDULES[number % len(mslcpu.SCHEDULES)]
    with emulated(M5), tuning.use_tiles("tensor"), mslcpu.options(schedule=order, seed=5), mslcpu.recording() as reports:
        errors = cells.run(cell)
    names = [report.name for report in reports]
    halves = 1 if cell.dtype == "float16" else 2
    if (cell.kernel, cell.mode, cell.dtype) == ("linear", "dense", "float32"):
        assert not names  # MLX's own product
    elif cell.kernel == "lens_stats":
        assert [name.endswith(f"_m32_tensor{halves}") for name in names] == [True, True, False], names
    elif cell.kernel == "lens_kl":
        # The few rows of the model are not multiplied in tiles, and the gradient's product has no such tile.
        assert [name for name in names if "tensor" in name] == ["metalens_linear_float_affine_b4_g64_float_m32_tensor2"], names
    elif cell.mode != "dense" or cell.dtype != "float16":  # MLX's, on the matrix units
        assert [name.endswith(f"_m32_tensor{halves}") for name in names] == [True], names
    assert errors.good, f"off by {errors.ours:.2e}, plain MLX by {errors.plain:.2e}"


def test_tiles_of_64_rows_and_another_layout_of_lanes(rng):
    weight = oracle.random_weight(rng, 70, 96, 4, 32, mx.float16, scale=0.2)
    x = oracle.random_array(rng, 120, 96)
    with emulated(M5), tuning.use_tiles("tensor"), mslcpu.recording() as reports:
        permuted = matmul.linear(x, weight, None, 1.0, rounded=False)
        with mslcpu.options(tensor_layout="blocks"):
            blocks = matmul.linear(x, weight, None, 1.0, rounded=False)
    assert {report.name for report in reports} == {descriptors.linear(mx.float32, format_of(weight), 64, False, True).name}
    assert mx.array_equal(permuted, blocks)
    np.testing.assert_allclose(np.array(permuted), oracle.product(x, weight), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- the error


def rows_with(kind, rng, rows, depth):
    """Return rows of float32 that are hard to split: all 24 bits used, exponents far apart, or so far that half's range ends inside 32 columns."""
    odd = 1 + (2 * rng.integers(0, 2**22, (rows, depth)) + 1) * 2.0**-23  # every last bit set
    signs = rng.choice([-1.0, 1.0], (rows, depth))
    exponents = {
        "last bits": np.zeros((rows, depth)),
        "steps far apart": np.repeat(rng.integers(-100, 60, (rows, -(-depth // 32))), 32, axis=1)[:, :depth],
        "columns far apart": rng.integers(-60, 4, (rows, depth)),
        "all too large for half": np.full((rows, depth), 90),
        "almost equal terms": np.zeros((rows, depth)),
    }[kind]
    if kind == "almost equal terms":  # their sum is small
        signs = np.where(np.arange(depth) % 2 == 0, 1.0, -1.0)[None]
        odd = 1 + rng.integers(0, 2, (rows, depth)) * 2.0**-23
    return (odd * signs * 2.0**exponents).astype(np.float32)


KINDS = ("last bits", "steps far apart", "columns far apart", "all too large for half", "almost equal terms")
WEIGHTS = {
    "affine4": lambda rng, v, d: oracle.random_weight(rng, v, d, 4, 32, mx.float16, scale=0.2),
    "affine8": lambda rng, v, d: oracle.random_weight(rng, v, d, 8, 64, mx.bfloat16, scale=0.2),
    "affine8 of float32": lambda rng, v, d: oracle.random_weight(rng, v, d, 8, 32, mx.float32, scale=0.2),
    "half": lambda rng, v, d: Weight(oracle.random_array(rng, v, d, dtype=mx.float16, scale=0.2)),
    "bfloat": lambda rng, v, d: Weight(oracle.random_array(rng, v, d, dtype=mx.bfloat16, scale=0.2)),
    "float": lambda rng, v, d: Weight(mx.array(rows_with("columns far apart", rng, v, d))),
    "nvfp4": lambda rng, v, d: Weight(*mx.quantize(oracle.random_array(rng, v, d, scale=0.2), mode="nvfp4"), None, 16, 4, "nvfp4"),
}


def bound(x, weight):
    """Return the bound of the error that metal/tensor_tile.h states, [N, V], in float64."""
    depth, w = x.shape[1], oracle.matrix(weight)
    if weight.mode == "affine" and weight.scales is not None:
        scales, biases = (np.repeat(oracle.wide(a), weight.group_size, axis=1) for a in (weight.scales, weight.biases))
        middle = biases + scales * 2 ** (weight.bits - 1)
        sizes, added = np.abs(w - middle), np.abs(middle)
    else:
        sizes, added = np.abs(w), np.zeros_like(w)
    is_float = weight.scales is None and weight.values.dtype == mx.float32
    terms = np.abs(x) @ (sizes + added).T
    small = np.zeros_like(terms)
    for k in range(0, depth, 32):
        of_x, of_w = np.abs(x[:, k : k + 32]), sizes[:, k : k + 32]
        small += of_x.max(1, keepdims=True) * of_w.sum(1)[None]
        if is_float:
            small += of_x.sum(1, keepdims=True) * of_w.max(1)[None]
    return ((136 if is_float else 72) + depth / 16) * 2.0**-24 * terms + 2.0**-39 * small


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", WEIGHTS)
def test_the_error_is_within_its_bound(rng, form, kind):
    weight = WEIGHTS[form](rng, 40, 192)
    x = rows_with(kind, rng, 9, 192)
    with emulated(M5), tuning.use_tiles("tensor"), mslcpu.recording() as reports:
        y = np.array(matmul.tile_linear(mx.array(x), weight, None, 1.0, rounded=False), np.float64)
    assert reports[0].name.endswith("_m32_tensor2")
    expected = x.astype(np.float64) @ oracle.matrix(weight).T
    assert np.all(np.abs(y - expected) <= bound(x.astype(np.float64), weight))


@pytest.mark.parametrize(("halves", "lost"), [(1, 2.0**-11), (2, 2.0**-23), (3, 0.0)])
def test_what_the_halves_keep_of_a_number(rng, halves, lost):
    """The product with an identity is the sum of the halves. Three would hold all 24 bits, for half as many products again."""
    weight = Weight(mx.eye(64, dtype=mx.float16))
    x = rows_with("steps far apart", rng, 9, 64)
    form = format_of(weight)
    tile = f"metalens::TensorTile<32, {halves}, {form.type}>"
    kernel = replace(descriptors.linear(mx.float32, form, 32, False, True), arguments=("float", form.type, tile), shared=f"{tile}::FLOATS")
    problem = mx.array(source.pack("linear.h", "LinearProblem", {"rows": 9, "depth": 64, "columns": 64, "with_bias": 0, "scale": 1.0}))
    with emulated(M5):
        inputs = [mx.array(x), *arrays(weight), absent(), problem]
        (y,) = launch(replace(kernel, label=f"{halves}_halves"), inputs, (1, 1, 1), [(9, 64)], [mx.float32])
    difference = np.abs(np.array(y, np.float64) - x)
    assert np.all(difference <= lost * np.abs(x))
    assert lost == 0 or np.any(difference > 0)


def test_one_half_keeps_eleven_bits(rng):
    weight = WEIGHTS["affine4"](rng, 40, 192)
    x = rows_with("last bits", rng, 9, 192)
    with emulated(M5), tuning.use_tiles("tensor"):
        y = np.array(matmul.tile_linear(mx.array(x), weight, None, 1.0, rounded=True), np.float64)
    wide = x.astype(np.float64)
    difference = np.abs(y - wide @ oracle.matrix(weight).T)
    of_rounding = 2.0**13 * bound(wide, weight) / (72 + 192 / 16)
    assert np.all(difference <= of_rounding + bound(wide, weight))
    assert np.any(difference > bound(wide, weight))


def test_rows_without_values_and_with_infinity(rng):
    weight = WEIGHTS["affine4"](rng, 40, 64)
    x = np.zeros((3, 64), np.float32)
    x[1, 5], x[2] = np.inf, 1e-40  # subnormal
    with emulated(M5), tuning.use_tiles("tensor"):
        y = np.array(matmul.tile_linear(mx.array(x), weight, None, 1.0, rounded=False))
    assert not y[0].any()
    assert np.isnan(y[1]).all()
    assert np.abs(y[2]).max() < 1e-37


# ---------------------------------------------------------------------- what the tile must not rely on

# The place of an element in one GPU's layout, in place of what the operation says.
ASSUMED = """int index[2] = {
          int(((lane / 4 & 2) + lane % 2) * 4 + i % 4 + i / 8 % 2 * 16), int((lane / 4 & 4) + lane / 2 % 4 + i / 4 % 2 * 8 + i / 16 * 16)};"""


@pytest.fixture
def changed(monkeypatch):
    """Return a function that replaces a part of the kernels' text, and how often it must occur."""

    def change(before, after, times):
        whole = source.inlined

        def text(name):
            found = whole(name)
            assert found.count(before) == times
            return found.replace(before, after)

        monkeypatch.setattr(metal_kernel, "inlined", text)
        metal_kernel._just_in_time.cache_clear()

    yield change
    metal_kernel._just_in_time.cache_clear()


def test_a_tile_that_assumes_the_layout_of_lanes_fails(rng, changed):
    weight, x = WEIGHTS["affine4"](rng, 70, 64), oracle.random_array(rng, 40, 64)
    changed("const auto index = sums.get_multidimensional_index(i);", ASSUMED, 2)
    with emulated(M5), tuning.use_tiles("tensor"):
        with mslcpu.options(tensor_layout="blocks"):
            y = matmul.tile_linear(x, weight, None, 1.0, rounded=False)
        np.testing.assert_allclose(np.array(y), oracle.product(x, weight), rtol=0, atol=1e-5)
        with pytest.raises(mslcpu.MslError, match="race|uninitialized|out-of-bounds"):
            matmul.tile_linear(x, weight, None, 1.0, rounded=False)


def test_a_tile_that_takes_every_place_for_an_element_fails(rng, changed):
    changed("if (sums.is_valid_element(i)) {\n      const auto index", "if (true) {\n      const auto index", 1)
    with emulated(M5), tuning.use_tiles("tensor"), pytest.raises(mslcpu.MslError, match="race"):
        matmul.tile_linear(oracle.random_array(rng, 40, 64), WEIGHTS["affine4"](rng, 70, 64), None, 1.0, rounded=False)


# ---------------------------------------------------------------------- counts


@pytest.mark.parametrize(("form", "precision", "products"), [("affine4", "float32", 2), ("affine4", "bfloat16", 1), ("float", "float32", 4)])
def test_matrix_operations(rng, form, precision, products):
    head = Head(WEIGHTS[form](rng, 200, 96))
    n = oracle.random_array(rng, 3, 9, 96)
    with emulated(M5), tuning.use_tiles("tensor"), use_precision(precision), mslcpu.recording() as reports:
        mx.eval(vars(lens_stats(n, head, 3)))
    (stats,) = [report for report in reports if report.name.startswith("metalens_lens_stats_float")]
    assert stats.matrix_ops == products * cost.tile_product(32, 200, 96)
    assert stats.buffers["values"].read == stats.buffers["values"].unique_read  # a single block: U is read once


def test_tiles_have_32_or_64_rows():
    with tuning.planned_for(M5), tuning.use_tiles("tensor"):
        generation = tuning.device().generation
    assert tuning.tile_rows(tuning.STATS_BLOCKS, generation) == tuning.tile_rows(tuning.MATMUL_BLOCKS, generation) == [32, 64]


# ---------------------------------------------------------------------- the setting


def test_nothing_uses_them_by_default(rng):
    head = oracle.make_head(rng, 70, 64)
    with emulated(M5), mslcpu.recording() as reports:
        mx.eval(vars(lens_stats(oracle.random_array(rng, 3, 9, 64), head, 3)))
    assert reports
    assert not any("tensor" in report.name for report in reports)


def test_the_environment_turns_them_on(rng, monkeypatch):
    head = oracle.make_head(rng, 70, 64)
    monkeypatch.setenv("METALENS_METAL_TILES", "tensor")
    with emulated(M5), mslcpu.recording() as reports:
        mx.eval(vars(lens_stats(oracle.random_array(rng, 3, 9, 64), head, 3)))
    assert any("tensor2" in report.name for report in reports)


@pytest.mark.parametrize("architecture", ["applegpu_g13s", "applegpu_g17s"], ids=["an M1", "an M5 under an older macOS"])
def test_other_gpus_refuse(rng, architecture):
    head = oracle.make_head(rng, 70, 64)
    device = tuning.Device(architecture, 8 * 2**30, 16)
    with emulated(device), tuning.use_tiles("tensor"), pytest.raises(UnavailableError, match=f"matrix units of an M5.*macOS 26.2.*{architecture}"):
        lens_stats(oracle.random_array(rng, 3, 9, 64), head, 3)


def test_unknown_tiles():
    with pytest.raises(InvalidValueError, match=r"use_tiles\(\) got 'nax'.*simdgroup, tensor"), tuning.use_tiles("nax"):
        pass


def test_an_older_metal_says_what_is_missing():
    text = '#undef __METAL_VERSION__\n#define __METAL_VERSION__ 320\n#include "tensor_kernels.h"\n'
    with pytest.raises(mslcpu.MslError, match="Tensor operations need Metal 4"):
        mslcpu.compile_library(text, include_dirs=[source.folder()])
