"""Every code and every scale of every quantized format, against mx.dequantize; and the type of the result."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens import _ext, use_backend
from metalens.ops import Weight, linear, quantized_matmul
from support import oracle

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
ROWS = (1, 2, 3, 4, 5, 13, 130)


def dequantized(w):
    """Return the weight's values [O, I] as MLX unpacks them, in float32."""
    return np.array(mx.dequantize(w.values, w.scales, w.biases, w.group_size, w.bits, w.mode, dtype=mx.float32))


def unpacked(w, rows):
    """Return the weight's values as the kernels read them: the product with the identity, a given number of rows at a time."""
    identity = mx.eye(w.shape[1])
    return np.concatenate([np.array(linear(identity[i : i + rows], w)).T for i in range(0, w.shape[1], rows)], axis=1)


def byte_weight(codes, scales, mode):
    bits, group_size = oracle.FLOAT_MODES[mode]
    return Weight(mx.array(np.ascontiguousarray(codes).view(np.uint32)), mx.array(scales), None, group_size, bits, mode)


FINITE = {"mxfp8": np.setdiff1d(np.arange(256), [127, 255]), "mxfp4": np.arange(256), "nvfp4": np.arange(256)}


@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("mode", oracle.FLOAT_MODES)
def test_every_byte_of_the_float_formats(rng, native, mode, rows):
    # Every possible byte of codes at each of the eight positions of a unit, with a scale of 1.
    codes = np.stack([np.roll(np.resize(FINITE[mode], 256), i) for i in range(8)]).astype(np.uint8)
    bits, group_size = oracle.FLOAT_MODES[mode]
    one = 56 if mode == "nvfp4" else 127
    w = byte_weight(codes, np.full((8, 256 * 8 // bits // group_size), one, np.uint8), mode)
    np.testing.assert_array_equal(unpacked(w, rows), dequantized(w))


@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("mode", oracle.FLOAT_MODES)
def test_every_scale_of_the_float_formats(native, mode, rows):
    bits, group_size = oracle.FLOAT_MODES[mode]
    # nvfp4: all of e4m3 but NaN. mx: powers of two from 2^-127; the largest would overflow, and 255 is NaN.
    scales = np.setdiff1d(np.arange(256), [127, 255]) if mode == "nvfp4" else np.arange(0, 240)
    scales = np.resize(scales, (4, 64)).astype(np.uint8)
    codes = np.resize(np.array([0x12, 0x34, 0x56, 0x1A, 0x2B, 0x3C], np.uint8), (4, 64 * group_size * bits // 8))
    w = byte_weight(codes, scales, mode)
    ours, theirs = unpacked(w, rows), dequantized(w)
    smallest = np.finfo(np.float32).tiny  # a processor may flush smaller values to zero
    np.testing.assert_array_equal(np.where(np.abs(theirs) < smallest, 0, ours), np.where(np.abs(theirs) < smallest, 0, theirs))
    assert (np.abs(ours[np.abs(theirs) < smallest]) <= smallest).all()


@pytest.mark.parametrize("rows", [1, 7])
def test_codes_and_scales_that_are_nan(native, rows):
    for mode, codes, scales in (("mxfp8", 127, 127), ("mxfp8", 255, 127), ("mxfp8", 1, 255), ("mxfp4", 0x11, 255), ("nvfp4", 0x11, 127)):
        bits, group_size = oracle.FLOAT_MODES[mode]
        w = byte_weight(np.full((1, group_size * bits // 8), codes, np.uint8), np.full((1, 1), scales, np.uint8), mode)
        assert np.isnan(oracle.wide(linear(mx.ones((rows, group_size)), w))).all(), (mode, codes, scales)


@pytest.mark.parametrize("stored", [*FLOATS, *oracle.FLOAT_MODES, 2, 3, 4, 5, 6, 8], ids=str)
def test_a_row_has_the_same_result_beside_up_to_three_others(rng, native, stored):
    # The rank of a label in lens_stats compares logits of several rows with one that was computed alone.
    if isinstance(stored, mx.Dtype):
        w = Weight(oracle.random_array(rng, 37, 384, dtype=stored))
    else:
        w = oracle.random_weight(rng, 37, 384, stored, 64) if isinstance(stored, int) else oracle.random_float_weight(rng, 37, 384, stored)
    x = oracle.random_array(rng, 4, 384)
    alone = np.concatenate([np.array(linear(x[row : row + 1], w, dtype=mx.float32)) for row in range(4)])
    for rows in (2, 3, 4):
        np.testing.assert_array_equal(np.array(linear(x[:rows], w, dtype=mx.float32)), alone[:rows])


@pytest.mark.parametrize("rows", [2, 64])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_affine_code_in_every_place(rng, native, bits, group_size, rows):
    w = oracle.random_weight(rng, 37, 512, bits, group_size)
    assert len(np.unique(oracle.codes(w))) == 2**bits
    values, size = oracle.matrix_and_magnitude(w)
    assert (np.abs(unpacked(w, rows) - values) <= 1e-6 * size).all()


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", oracle.FLOAT_MODES)
def test_products_of_the_float_formats(rng, cpu_backend, mode, dtype, transpose):
    for outputs, inputs in ((1, 32), (33, 128), (67, 384)):
        for rows in ROWS:
            w = oracle.random_float_weight(rng, outputs, inputs, mode)
            x = oracle.random_array(rng, rows, inputs if transpose else outputs, dtype=dtype)
            y = linear(x, w, transpose)
            assert y.dtype == dtype
            if cpu_backend == "native":
                oracle.assert_product(y, x, w, transpose)
            else:
                oracle.assert_product_of_mlx(y, x, w, transpose, dtype)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_what_mx_quantize_makes(rng, cpu_backend, bits, transpose):
    w = Weight(*mx.quantize(oracle.random_array(rng, 67, 128), 64, bits), 64, bits)
    for rows in (1, 5):
        x = oracle.random_array(rng, rows, 128 if transpose else 67)
        oracle.assert_product(linear(x, w, transpose), x, w, transpose)


@given(
    mode=st.sampled_from(list(oracle.FLOAT_MODES)),
    rows=st.integers(0, 7),
    outputs=st.integers(1, 70),
    blocks=st.integers(1, 20),
    dtype=st.sampled_from(FLOATS),
    transpose=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_shape_of_the_float_formats(mode, rows, outputs, blocks, dtype, transpose, seed):
    rng = np.random.default_rng(seed)
    inputs = 32 * blocks  # mx.dequantize, which the oracle uses, rejects odd numbers of groups of 16
    w = oracle.random_float_weight(rng, outputs, inputs, mode)
    x = oracle.random_array(rng, rows, inputs if transpose else outputs, dtype=dtype)
    with use_backend("native"):
        oracle.assert_product(linear(x, w, transpose), x, w, transpose)


# ---------------------------------------------------------------------- the type of the result


def weights(rng, dtype):
    quantized = [oracle.random_weight(rng, 33, 128, dtype=dtype), oracle.random_float_weight(rng, 33, 128, "mxfp4")]
    return [Weight(oracle.random_array(rng, 33, 128, dtype=dtype)), *quantized]


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("wanted", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_result_has_the_type_asked_for(rng, cpu_backend, dtype, wanted, transpose):
    for w in weights(rng, dtype):
        x = oracle.random_array(rng, 5, 128 if transpose else 33, dtype=dtype)
        y = linear(x, w, transpose, wanted)
        assert y.dtype == wanted
        if cpu_backend == "native":  # one rounding, to the requested type; plain MLX computes in x's type first
            oracle.assert_product(y, x, w, transpose)
        else:
            oracle.assert_product_of_mlx(y, x, w, transpose, max(dtype, wanted, key=oracle.EPSILON.get))


@pytest.mark.parametrize("scales", FLOATS, ids=str)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_by_default_the_result_has_the_type_that_mlx_gives_it(rng, cpu_backend, x_dtype, scales):
    for w in weights(rng, scales):
        x = oracle.random_array(rng, 5, 128, dtype=x_dtype)
        plain = x @ w.values.T if w.scales is None else mx.quantized_matmul(x, w.values, w.scales, w.biases, True, w.group_size, w.bits, w.mode)
        assert linear(x, w).dtype == plain.dtype


def test_a_wide_result_of_narrow_rows_is_as_exact_as_float32(rng, native):
    w, x = oracle.random_weight(rng, 33, 128, dtype=mx.bfloat16), oracle.random_array(rng, 5, 128, dtype=mx.bfloat16)
    y = quantized_matmul(x, w.values, w.scales, w.biases, 32, 4, dtype=mx.float32)
    oracle.assert_product(y, x, w, epsilon=1e-6)


def test_a_gradient_goes_through_the_type_of_the_result(rng, cpu_backend):
    w, x = oracle.random_weight(rng, 33, 128), oracle.random_array(rng, 5, 128)
    slope = mx.grad(lambda x: mx.sum(linear(x, w, dtype=mx.float16).astype(mx.float32)))(x)
    assert slope.dtype == mx.float32
    oracle.assert_product(slope, mx.ones((5, 33)), w, False, epsilon=1e-3)


@pytest.mark.parametrize("mode", oracle.FLOAT_MODES)
def test_the_float_formats_run_natively(rng, native, monkeypatch, mode):
    calls = []
    monkeypatch.setattr(_ext, "quantized_matmul", lambda *args, kept=_ext.quantized_matmul: (calls.append(args), kept(*args))[1])
    linear(oracle.random_array(rng, 2, 128), oracle.random_float_weight(rng, 3, 128, mode))
    assert len(calls) == 1


def test_formats_without_kernels_run_in_plain_mlx(rng, native):
    values, scales, biases = mx.quantize(oracle.random_array(rng, 33, 128), 32, 4)
    x, w = oracle.random_array(rng, 5, 128), Weight(values, scales.astype(mx.float16), biases.astype(mx.float16), 32, 4)
    with_mixed = Weight(w.values, w.scales, biases, 32, 4)  # scales and biases of two types
    expected = mx.quantized_matmul(x, values, w.scales, biases, True, 32, 4)
    assert mx.array_equal(linear(x, with_mixed), expected)
    integers = mx.ones((5, 128), dtype=mx.int32)
    dense = Weight(mx.ones((3, 128), dtype=mx.int32))
    assert linear(integers.astype(mx.float32), Weight(dense.values.astype(mx.float32))).tolist() == [[128.0] * 3] * 5
