import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens.ops import Weight, linear
from support import oracle

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
BITS = [2, 3, 4, 5, 6, 8]
GROUPS = [32, 64, 128]
# Rows: each number that the kernels for few rows accept, and the next; odd; more than one task of a thread. Outputs: one, one more than a panel,
# prime. Inputs: 384 is more than one block of the reduction and not a multiple of it.
ROWS, OUTPUTS, INPUTS = (1, 2, 3, 4, 5, 13, 130), (1, 33, 67), (128, 384)

pytestmark = pytest.mark.usefixtures("native")


def plain(x, w, transpose=True):
    """Return the same product in plain MLX, which is differentiable too."""
    if w.scales is None:
        return x @ (w.values.T if transpose else w.values)
    return mx.quantized_matmul(x, w.values, w.scales, w.biases, transpose, w.group_size, w.bits)


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_quantized_product_is_exact_up_to_one_rounding(rng, bits, group_size, dtype, transpose):
    for outputs in OUTPUTS:
        for inputs in INPUTS:
            w = oracle.random_weight(rng, outputs, inputs, bits, group_size, dtype)
            for rows in ROWS:
                x = oracle.random_array(rng, rows, inputs if transpose else outputs, dtype=dtype)
                y = linear(x, w, transpose)
                assert y.dtype == dtype
                oracle.assert_product(y, x, w, transpose)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("w_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_dense_product_is_exact_up_to_one_rounding(rng, x_dtype, w_dtype, transpose):
    for outputs in OUTPUTS:
        for inputs in (*INPUTS, 1, 257):
            w = Weight(oracle.random_array(rng, outputs, inputs, dtype=w_dtype))
            for rows in ROWS:
                x = oracle.random_array(rng, rows, inputs if transpose else outputs, dtype=x_dtype)
                y = linear(x, w, transpose)
                assert y.dtype == mx.result_type(x, w.values)
                oracle.assert_product(y, x, w, transpose)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", [None, *BITS])
def test_no_less_exact_than_plain_mlx(rng, bits, dtype, transpose):
    w = Weight(oracle.random_array(rng, 33, 384, dtype=dtype)) if bits is None else oracle.random_weight(rng, 33, 384, bits, 64, dtype)
    x = oracle.random_array(rng, 13, 384 if transpose else 33, dtype=dtype)
    expected = oracle.product(x, w, transpose)
    ours, theirs = (np.abs(oracle.wide(y) - expected) for y in (linear(x, w, transpose), plain(x, w, transpose)))
    assert (ours - oracle.EPSILON[dtype] * np.abs(expected)).max() <= theirs.max()


@given(
    lead=st.lists(st.integers(0, 5), max_size=3),
    outputs=st.integers(1, 80),
    groups=st.integers(1, 9),
    group_size=st.sampled_from(GROUPS),
    bits=st.sampled_from([None, *BITS]),
    dtype=st.sampled_from(FLOATS),
    transpose=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_shape(lead, outputs, groups, group_size, bits, dtype, transpose, seed):
    rng = np.random.default_rng(seed)
    if bits is None:
        inputs = groups * 7  # the width of a dense weight need not be a multiple of anything
        w = Weight(oracle.random_array(rng, outputs, inputs, dtype=dtype))
    else:
        inputs = groups * group_size
        w = oracle.random_weight(rng, outputs, inputs, bits, group_size, dtype)
    x = oracle.random_array(rng, *lead, inputs if transpose else outputs, dtype=dtype)
    y = linear(x, w, transpose)
    assert y.shape == (*lead, outputs if transpose else inputs)
    oracle.assert_product(y, x, w, transpose)


@pytest.mark.parametrize("shape", [(128,), (2, 3, 5, 128), (1, 1, 128), (0, 128), (3, 0, 128), (0, 0, 128)])
@pytest.mark.parametrize("quantized", [True, False])
def test_any_number_of_leading_axes(rng, shape, quantized):
    w = oracle.random_weight(rng, 33, 128) if quantized else Weight(oracle.random_array(rng, 33, 128))
    x = oracle.random_array(rng, *shape)
    y = linear(x, w)
    assert y.shape == (*shape[:-1], 33)
    oracle.assert_product(y, x, w)


def test_no_rows_in_plain_mlx_either(run_python):
    # In a separate process: mlx.core.quantized_matmul divides by the number of rows, which ends the process.
    script = """
import mlx.core as mx, numpy as np
from support import oracle
from metalens import use_backend
from metalens.ops import linear
w = oracle.random_weight(np.random.default_rng(0), 33, 128)
with use_backend("reference"):
    results = linear(mx.zeros((0, 128)), w), linear(mx.zeros((2, 0, 33)), w, transpose=False)
mx.eval(results)
print(*(y.shape for y in results))
"""
    assert run_python(script).strip() == "(0, 33) (2, 0, 128)"


def test_an_empty_sum_is_zero():
    assert mx.array_equal(linear(mx.zeros((3, 0)), Weight(mx.zeros((5, 0)))), mx.zeros((3, 5)))
    assert linear(mx.zeros((3, 4)), Weight(mx.zeros((0, 4)))).shape == (3, 0)
    assert mx.array_equal(linear(mx.zeros((3, 0)), Weight(mx.zeros((0, 4))), transpose=False), mx.zeros((3, 4)))


@pytest.mark.parametrize("transpose", [True, False])
def test_vocabulary_beyond_16_bits(rng, transpose):
    w = oracle.random_weight(rng, 66001, 32)
    x = oracle.random_array(rng, 3, 32 if transpose else 66001)
    oracle.assert_product(linear(x, w, transpose), x, w, transpose)


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_scales_of_another_type_than_x(rng, x_dtype, scale_dtype):
    w = oracle.random_weight(rng, 33, 128, dtype=scale_dtype)
    x = oracle.random_array(rng, 5, 128, dtype=x_dtype)
    y = linear(x, w)
    assert y.dtype == plain(x, w).dtype
    oracle.assert_product(y, x, w)  # as exact as the type of y, like plain MLX: not rounded to x's type on the way


NOT_CONTIGUOUS = {
    "transposed": lambda a: mx.contiguous(a.T).T,
    "every second row": lambda a: mx.repeat(a, 2, axis=0)[::2],
    "every third column": lambda a: mx.repeat(a, 3, axis=1)[:, ::3],
    "a slice in the middle": lambda a: mx.pad(a, ((2, 3), (1, 4)))[2:-3, 1:-4],
    "reversed": lambda a: mx.contiguous(a[::-1, ::-1])[::-1, ::-1],
}


@pytest.mark.parametrize("view", NOT_CONTIGUOUS.values(), ids=NOT_CONTIGUOUS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_views_that_are_not_contiguous(rng, view, dtype):
    x, dense, w = (
        oracle.random_array(rng, 7, 128, dtype=dtype),
        oracle.random_array(rng, 33, 128, dtype=dtype),
        oracle.random_weight(rng, 33, 128, 3, 64),
    )
    for weight in (Weight(view(dense)), Weight(view(w.values), view(w.scales), view(w.biases), w.group_size, w.bits)):
        straight = Weight(dense) if weight.scales is None else w
        assert mx.array_equal(linear(view(x), weight), linear(x, straight))
        assert mx.array_equal(linear(x[:, :33], weight, transpose=False), linear(mx.contiguous(x[:, :33]), straight, transpose=False))


@pytest.mark.parametrize("rows", [1, 4, 24])
def test_broadcast_rows(rng, rows):
    w, x = oracle.random_weight(rng, 33, 128), oracle.random_array(rng, 1, 128)
    y = linear(mx.broadcast_to(x, (2, rows, 128)), w)
    assert mx.array_equal(y, mx.broadcast_to(y[:1, :1], (2, rows, 33)))
    oracle.assert_product(y[0, :1], x, w)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [3, 9])
def test_a_bad_row_stays_alone(rng, rows, value, dtype, transpose):
    x = oracle.random_array(rng, rows, 128)
    x[1, 100] = value
    size = (33, 128) if transpose else (128, 64)
    for w in (oracle.random_weight(rng, *size), Weight(oracle.random_array(rng, *size)), oracle.random_float_weight(rng, *size, "mxfp4")):
        y = oracle.wide(linear(x.astype(dtype), w, transpose))
        used = oracle.matrix(w)[:, 100] != 0 if transpose else oracle.matrix(w)[100] != 0
        assert not np.isfinite(y[1][used]).any()  # nothing may turn a NaN into a number, not even the narrowing to 16 bits
        assert np.isfinite(np.delete(y, 1, axis=0)).all()


def test_float16_overflows_to_infinity():
    y = linear(
        mx.full((2, 64), 1000.0, dtype=mx.float16), Weight(mx.array([[4.0], [-4.0], [0.5]], dtype=mx.float16) * mx.ones((1, 64), dtype=mx.float16))
    )
    assert y.tolist() == [[float("inf"), -float("inf"), 32000.0]] * 2


def test_bfloat16_rounds_to_nearest_even():
    # Between 1 and 2 a bfloat16 has 7 bits: 1 + 2^-8 is halfway and rounds down to the even neighbor, 1 + 3 * 2^-8 rounds up to it.
    terms = mx.array([[1.0, 2**-8], [1.0, 3 * 2**-8], [1.0, 1.01 * 2**-8]], dtype=mx.bfloat16)
    assert linear(terms, Weight(mx.ones((1, 2), dtype=mx.bfloat16))).reshape(-1).tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]


def test_weight_knows_its_unpacked_shape(rng):
    assert Weight(mx.zeros((5, 7))).shape == (5, 7)
    for bits in BITS:
        assert oracle.random_weight(rng, 5, 384, bits, 128).shape == (5, 384)
