"""Test products on GPUs with matrix units: what is rounded, what is not, and which kernels run.

MLX's products on a CPU stand for those of the GPU.
"""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mslcpu
from metalens.ops import Head, Norm, Weight, lens_kl, lens_stats, lens_target, translate_norm, use_backend, use_precision
from metalens.ops.kl import _LENS_TARGET
from metalens.ops.metal import kernel, matrix_units, tuning
from metalens.ops.stats import _LENS_STATS
from support import oracle
from support.metal_emulation import emulated, needs_clang

M5 = tuning.Device("applegpu_g17g", 10 * 2**30, 10, matrix_units=True)


@pytest.fixture(autouse=True)
def tf32(monkeypatch):
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)


def truncated(x):
    """Return float32 numbers with 11 significant bits, as MLX's users report of the matrix units (ml-explore/mlx#4411)."""
    return (np.array(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def rounding_product(a, b):
    return mx.array((truncated(a).astype(np.float64) @ truncated(b).astype(np.float64)).astype(np.float32))


def error(found, a, b):
    """Return the largest error relative to the sums of absolute terms."""
    a, b = np.array(a).astype(np.float64), np.array(b).astype(np.float64)
    return np.max(np.abs(np.array(found) - a @ b) / (np.abs(a) @ np.abs(b)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 257, 5), (64, 96, 33)])
def test_a_split_product_has_the_errors_of_float32(rng, shape):
    rows, depth, columns = shape
    a, b = oracle.random_array(rng, rows, depth), oracle.random_array(rng, depth, columns)
    found = matrix_units.split_product(a, b, rounding_product)
    assert error(found, a, b) < 4e-7
    if depth > 1:
        assert error(rounding_product(a, b), a, b) > 1e-4


@given(st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=1, max_size=40))
@settings(deadline=None)
def test_halves_add_up_to_the_number(numbers):
    x = np.array(numbers, np.float32)
    high, low = map(np.array, matrix_units._halves(mx.array(x)))
    assert np.array_equal(high + low, x)
    tiny = np.abs(x) < 2.0**-100  # the lower half of a tiny number is subnormal, which a GPU takes for 0
    largest = np.abs(x) > 3.4e38
    assert np.array_equal(high[~largest & np.isfinite(x)], truncated(high)[~largest & np.isfinite(x)])
    finite = np.isfinite(x) & ~tiny
    assert np.all(np.abs(low[finite]) <= np.abs(x[finite]) * 2.0**-11)
    assert np.all(np.abs(low - truncated(low))[finite] <= np.abs(x[finite]) * 2.0**-22)  # what rounding takes from up to 12 bits


def test_what_is_not_finite_stays_so():
    payload = np.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)  # every bit of a NaN, the fewest, and with its sign
    high, low = map(np.array, matrix_units._halves(mx.array(np.array([np.inf, -np.inf, 3.4028234e38, *payload], np.float32))))
    assert high[:3].tolist() == [np.inf, -np.inf, np.float32(3.4028234e38)]
    assert np.all(np.isnan(high[3:]))
    assert np.array_equal(low, np.zeros(6))


def test_elsewhere_a_product_is_plain(rng, monkeypatch):
    a, b = oracle.random_array(rng, 5, 64), oracle.random_array(rng, 64, 7)
    split = []
    monkeypatch.setattr(matrix_units, "split_product", lambda a, b, _: split.append(1) or a @ b)
    assert np.array_equal(np.array(matrix_units.matmul(a, b)), np.array(a @ b))
    assert not split
    with tuning.planned_for(M5):
        matrix_units.matmul(a, b)
        assert split == [1]
        monkeypatch.setenv("MLX_ENABLE_TF32", "0")
        matrix_units.matmul(a, b)
        assert split == [1]


def test_the_translators_products_are_split(rng, monkeypatch):
    shapes = []
    whole = matrix_units.split_product
    monkeypatch.setattr(matrix_units, "split_product", lambda a, b, multiply: shapes.append((a.shape, b.shape)) or whole(a, b, multiply))

    def stand_in(**_):
        return lambda output_shapes, output_dtypes, **_: [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

    norm = Norm(lambda y: y, "rms", mx.ones(64), None, 1e-5)
    h, w, b = oracle.random_array(rng, 20, 64), mx.eye(64), mx.zeros(64)
    try:
        with kernel.emulation(stand_in, M5), use_backend("metal"):
            mx.vjp(lambda h, w: translate_norm(h, w, b, norm), [h, w], [h])
    finally:
        kernel._just_in_time.cache_clear()
    assert {((20, 64), (64, 64)), ((64, 20), (20, 64))} <= set(shapes)


WEIGHTS = [("dense", 0, 0), ("affine", 4, 64), ("affine", 8, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def weight(rng, mode, bits, group_size, rows, columns):
    u = oracle.random_array(rng, rows, columns)
    if mode == "dense":
        return Weight(u.astype(mx.bfloat16))
    values, scales, *biases = mx.quantize(u, group_size, bits, mode)
    if biases:
        scales, biases = scales.astype(mx.bfloat16), [biases[0].astype(mx.bfloat16)]
    return Weight(values, scales, biases[0] if biases else None, group_size, bits, mode)


@needs_clang
@pytest.mark.parametrize(("mode", "bits", "group_size"), WEIGHTS)
def test_a_loss_in_16_bits_multiplies_with_mlx(rng, monkeypatch, mode, bits, group_size):
    monkeypatch.setattr(matrix_units, "PIECE_BYTES", 4 * 64 * 50)  # three pieces
    head = Head(weight(rng, mode, bits, group_size, 131, 64), bias=oracle.random_array(rng, 131), scale=0.5, used_rows=127)
    n_model = oracle.random_array(rng, 33, 64)
    n = n_model[None] + oracle.random_array(rng, 3, 33, 64, scale=0.3)
    with emulated(M5), use_precision("bfloat16"), mslcpu.recording() as reports:
        kl, dn = lens_kl(n, lens_target(n_model, head), head)
        mx.eval(kl, dn)
    names = [r.name for r in reports]
    assert all("lens_backward" not in name for name in names)
    assert sum("lens_softmax_grad_float" in name for name in names) == 1
    expected = oracle.lens_kl(n, n_model, head)
    np.testing.assert_allclose(oracle.wide(kl), expected[0], rtol=2e-2, atol=1e-3)  # lse_model is rounded as little as MLX's own
    assert oracle.row_errors(dn, expected[1]).max() < 5e-3


@needs_clang
def test_a_loss_in_float32_keeps_the_kernels(rng):
    head, n = oracle.make_head(rng, 131, 64), oracle.random_array(rng, 3, 12, 64)
    with emulated(M5), mslcpu.recording() as reports:
        mx.eval(*lens_kl(n, lens_target(n[0], head), head))
    names = " ".join(r.name for r in reports)
    assert "lens_backward" in names
    assert "_linear_" in names


@pytest.mark.parametrize(
    ("precision", "tokens", "environment", "backend"),
    [
        ("bfloat16", 13, "1", "reference"),
        ("bfloat16", 12, "1", "metal"),  # so few rows are bound by reading U
        ("float32", 100, "1", "metal"),
        ("bfloat16", 100, "0", "metal"),
    ],
)
def test_which_implementation_runs(rng, monkeypatch, precision, tokens, environment, backend):
    monkeypatch.setenv("MLX_ENABLE_TF32", environment)
    head, n = oracle.make_head(rng, 131, 64), oracle.random_array(rng, 1, tokens, 64)
    with emulated(M5), use_precision(precision):
        for chosen, reason in (_LENS_STATS.select(n, head, 5, None, None), _LENS_TARGET.select(n[0], head)):
            assert chosen.backend == backend
            assert reason == (matrix_units.MATRIX_UNITS_ARE_FASTER if backend == "reference" else "")


def test_statistics_in_16_bits_run_in_plain_mlx(rng):
    head, n = oracle.make_head(rng, 131, 64), oracle.random_array(rng, 3, 20, 64)
    with emulated(M5), use_precision("bfloat16"), mslcpu.recording() as reports:
        found = lens_stats(n, head, 3)
        mx.eval(found.lse)
    assert not reports
    z = oracle.head_logits(oracle.wide(n), head)
    np.testing.assert_array_equal(np.array(found.top_ids), np.argsort(-z, axis=-1, kind="stable")[..., :3])
