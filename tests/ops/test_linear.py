import hashlib
import threading

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import oracle
from metalens import _ext, use_backend
from metalens.ops import Weight, linear, quantized_matmul

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
BITS = [2, 3, 4, 5, 6, 8]
GROUPS = [32, 64, 128]
# Rows: fewer than a register tile, odd, more than one share of a thread. Outputs: one, one more than a panel, prime. Inputs: 384 is more than one
# block of the reduction and not a multiple of it.
ROWS, OUTPUTS, INPUTS = (1, 13, 70), (1, 33, 67), (128, 384)

pytestmark = pytest.mark.usefixtures("native")


def plain(x, w, transpose=True):
    """The same product in plain MLX, with gradients and all."""
    if w.scales is None:
        return x @ (w.values.T if transpose else w.values)
    return mx.quantized_matmul(x, w.values, w.scales, w.biases, transpose, w.group_size, w.bits)


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_quantised_product_is_exact_up_to_one_rounding(rng, bits, group_size, dtype, transpose):
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
        inputs = groups * 7  # dense weights need not be a multiple of anything
        w = Weight(oracle.random_array(rng, outputs, inputs, dtype=dtype))
    else:
        inputs = groups * group_size
        w = oracle.random_weight(rng, outputs, inputs, bits, group_size, dtype)
    x = oracle.random_array(rng, *lead, inputs if transpose else outputs, dtype=dtype)
    y = linear(x, w, transpose)
    assert y.shape == (*lead, outputs if transpose else inputs)
    oracle.assert_product(y, x, w, transpose)


@pytest.mark.parametrize("shape", [(128,), (2, 3, 5, 128), (1, 1, 128), (0, 128), (3, 0, 128), (0, 0, 128)])
@pytest.mark.parametrize("quantised", [True, False])
def test_any_number_of_leading_axes(rng, shape, quantised):
    w = oracle.random_weight(rng, 33, 128) if quantised else Weight(oracle.random_array(rng, 33, 128))
    x = oracle.random_array(rng, *shape)
    y = linear(x, w)
    assert y.shape == (*shape[:-1], 33)
    oracle.assert_product(y, x, w)


def test_no_rows_in_plain_mlx_either(run_python):
    # In a process of its own: mlx.core.quantized_matmul divides by the number of rows, which ends the process.
    script = """
import mlx.core as mx, numpy as np, oracle
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
    oracle.assert_product(y, x, w)  # as exact as that type promises, as plain MLX is: not rounded to x's type on the way


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


def test_broadcast_rows(rng):
    w, x = oracle.random_weight(rng, 33, 128), oracle.random_array(rng, 1, 128)
    y = linear(mx.broadcast_to(x, (4, 6, 128)), w)
    assert mx.array_equal(y, mx.broadcast_to(linear(x, w), (4, 6, 33)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_bad_row_stays_alone(rng, value, dtype):
    w, x = oracle.random_weight(rng, 33, 128), oracle.random_array(rng, 9, 128)
    x[4, 100] = value
    finite = np.isfinite(oracle.wide(linear(x.astype(dtype), w)))
    assert not finite[4].any()  # nothing may turn a NaN into a number, the narrowing to 16 bits neither
    assert np.delete(finite, 4, axis=0).all()


def test_float16_overflows_to_infinity():
    y = linear(
        mx.full((2, 64), 1000.0, dtype=mx.float16), Weight(mx.array([[4.0], [-4.0], [0.5]], dtype=mx.float16) * mx.ones((1, 64), dtype=mx.float16))
    )
    assert y.tolist() == [[float("inf"), -float("inf"), 32000.0]] * 2


def test_bfloat16_rounds_to_nearest_even():
    # Between 1 and 2 a bfloat16 has 7 bits: 1 + 2^-8 lies halfway to the next one and goes to the even neighbour, 1 + 3 * 2^-8 likewise upwards.
    terms = mx.array([[1.0, 2**-8], [1.0, 3 * 2**-8], [1.0, 1.01 * 2**-8]], dtype=mx.bfloat16)
    assert linear(terms, Weight(mx.ones((1, 2), dtype=mx.bfloat16))).reshape(-1).tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]


def test_weight_knows_its_unpacked_shape(rng):
    assert Weight(mx.zeros((5, 7))).shape == (5, 7)
    for bits in BITS:
        assert oracle.random_weight(rng, 5, 384, bits, 128).shape == (5, 384)


def test_other_quantisation_modes_run_in_plain_mlx(rng):
    values, scales = mx.quantize(oracle.random_array(rng, 33, 128), group_size=32, bits=4, mode="mxfp4")
    x = oracle.random_array(rng, 5, 128)
    expected = mx.quantized_matmul(x, values, scales, None, True, 32, 4, "mxfp4")
    assert mx.array_equal(linear(x, Weight(values, scales, None, 32, 4, "mxfp4")), expected)


# ---------------------------------------------------------------------- transformations


def weights(rng):
    """A square weight of both kinds, so that both orientations take the same x."""
    return [Weight(oracle.random_array(rng, 64, 64, scale=0.1)), oracle.random_weight(rng, 64, 64, scale=0.1)]


def assert_close(ours, theirs, tolerance=1e-5):
    """Within `tolerance` of the largest element: gradients are sums in which small elements cancel."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    a, b = oracle.wide(ours), oracle.wide(theirs)
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
def test_gradient_in_x(rng, shape, transpose):
    x = oracle.random_array(rng, *shape)
    for w in weights(rng):
        ours, theirs = (mx.grad(lambda x, f=f, w=w: mx.sum(mx.sin(f(x, w, transpose))))(x) for f in (linear, plain))
        assert_close(ours, theirs)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
def test_gradient_in_a_dense_weight_sums_over_all_rows(rng, shape, transpose):
    x, w = oracle.random_array(rng, *shape), weights(rng)[0].values
    ours, theirs = (mx.grad(lambda x, w, f=f: mx.sum(mx.sin(f(x, Weight(w), transpose))), argnums=(0, 1))(x, w) for f in (linear, plain))
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("transpose", [True, False])
def test_vjp_and_jvp_of_oblong_weights(rng, transpose):
    for w in (Weight(oracle.random_array(rng, 33, 128)), oracle.random_weight(rng, 33, 128, 5, 64)):
        x, tangent = (oracle.random_array(rng, 3, 128 if transpose else 33) for _ in range(2))
        cotangent = oracle.random_array(rng, 3, 33 if transpose else 128)
        (y,), (pulled,) = mx.vjp(lambda x, w=w: linear(x, w, transpose), [x], [cotangent])
        oracle.assert_product(y, x, w, transpose)
        oracle.assert_product(pulled, cotangent, w, not transpose)
        (y,), (pushed,) = mx.jvp(lambda x, w=w: linear(x, w, transpose), [x], [tangent])
        oracle.assert_product(y, x, w, transpose)
        oracle.assert_product(pushed, tangent, w, transpose)


@pytest.mark.parametrize("transpose", [True, False])
def test_jvp_in_both_arguments_follows_the_product_rule(rng, transpose):
    x, dx = (oracle.random_array(rng, 5, 64) for _ in range(2))
    w, dw = (oracle.random_array(rng, 64, 64) for _ in range(2))
    _, (ours,) = mx.jvp(lambda x, w: linear(x, Weight(w), transpose), [x, w], [dx, dw])
    assert_close(ours, plain(dx, Weight(w), transpose) + plain(x, Weight(dw), transpose))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_gradients_have_their_argument_s_type(rng, dtype):
    x, w = oracle.random_array(rng, 5, 64, dtype=dtype), weights(rng)
    assert mx.grad(lambda x: mx.sum(linear(x, w[1])))(x).dtype == dtype
    dx, dw = mx.grad(lambda x, w: mx.sum(linear(x, Weight(w))), argnums=(0, 1))(x, w[0].values)  # of a float32 product
    assert (dx.dtype, dw.dtype) == (dtype, mx.float32)
    assert_close(dx, mx.sum(w[0].values, axis=0).astype(dtype)[None] * mx.ones((5, 1), dtype=dtype), tolerance=oracle.EPSILON[dtype])


def test_second_derivatives(rng):
    x = oracle.random_array(rng, 3, 64)
    for w in weights(rng):
        ours, theirs = (mx.grad(lambda x, f=f, w=w: mx.sum(mx.square(mx.grad(lambda v: mx.sum(mx.sin(f(v, w))))(x))))(x) for f in (linear, plain))
        assert_close(ours, theirs, 1e-4)


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize(("in_axes", "out_axes"), [(0, 0), (1, 0), (2, 0), (-1, 0), (0, 1), (1, 2)])
def test_vmap_over_x(rng, in_axes, out_axes, transpose):
    rows = oracle.random_array(rng, 4, 3, 64)
    x = mx.moveaxis(rows, 0, in_axes)
    for w in weights(rng):
        y = mx.vmap(lambda x, w=w: linear(x, w, transpose), in_axes, out_axes)(x)
        assert_close(mx.moveaxis(y, out_axes, 0), linear(rows, w, transpose))


def test_nested_vmap_and_gradients_per_example(rng):
    x = oracle.random_array(rng, 2, 3, 64)
    for w in weights(rng):
        assert_close(mx.vmap(mx.vmap(lambda x, w=w: linear(x, w)))(x), linear(x, w))
        per_example = mx.vmap(mx.grad(lambda x, w=w: mx.sum(mx.sin(linear(x, w)))))(x[0])
        assert_close(per_example, mx.grad(lambda x, w=w: mx.sum(mx.sin(linear(x, w))))(x[0]))


def test_vmap_over_the_weight_is_refused(rng):
    x, w = oracle.random_array(rng, 3, 64), oracle.random_array(rng, 2, 5, 64)
    with pytest.raises(ValueError, match="vmap over the weight"):
        mx.vmap(lambda w: linear(x, Weight(w)))(w)


@pytest.mark.parametrize("shapeless", [False, True])
def test_compiled_is_the_same_as_eager(rng, shapeless):
    for w in weights(rng):

        def function(x, w=w):
            return linear(x * 2, w) + 1, linear(x, w, transpose=False)

        compiled = mx.compile(function, shapeless=shapeless)
        for rows in (3, 8, 3):  # another shape, and the first one again from the cache
            x = oracle.random_array(rng, rows, 64)
            for ours, eager in zip(compiled(x), function(x), strict=True):
                assert mx.array_equal(ours, eager)


def test_compiled_gradient(rng):
    x = oracle.random_array(rng, 3, 64)
    for w in weights(rng):
        gradient = mx.grad(lambda x, w=w: mx.sum(mx.square(linear(x, w))))
        assert_close(mx.compile(gradient)(x), gradient(x), 1e-6)


def test_compile_does_not_merge_products_that_differ(rng):
    # Same inputs, another orientation; same inputs, read as 4-bit codes in groups of 64 or as 8-bit codes in groups of 32. Only what depends on
    # arguments is merged, and only what is no result itself: hence the minus signs.
    w, q = oracle.random_array(rng, 64, 64), oracle.random_weight(rng, 8, 128, 4, 64)
    x, short = oracle.random_array(rng, 3, 64), oracle.random_array(rng, 3, 8)

    def products(x, w, short, *parts):
        dense = -linear(x, Weight(w)), -linear(x, Weight(w), transpose=False)
        return *dense, -linear(short, Weight(*parts, 64, 4), transpose=False), -linear(short, Weight(*parts, 32, 8), transpose=False)

    forward, backward, as4, as8 = mx.compile(products)(x, w, short, q.values, q.scales, q.biases)
    oracle.assert_product(-forward, x, Weight(w))
    oracle.assert_product(-backward, x, Weight(w), transpose=False)
    oracle.assert_product(-as4, short, q, transpose=False)
    oracle.assert_product(-as8, short, Weight(q.values, q.scales, q.biases, 32, 8), transpose=False)


# ---------------------------------------------------------------------- evaluation


def test_streams(rng):
    w, x = oracle.random_weight(rng, 33, 128), oracle.random_array(rng, 5, 128)
    dense = oracle.random_array(rng, 33, 128)
    for stream in (None, mx.cpu, mx.new_stream(mx.cpu)):
        oracle.assert_product(_ext.quantized_matmul(x, w.values, w.scales, w.biases, 32, 4, stream=stream), x, w)
        oracle.assert_product(_ext.matmul(x, dense, stream=stream), x, Weight(dense))
    with mx.stream(mx.new_stream(mx.cpu)):
        y = linear(x, w)
    oracle.assert_product(y + 0, x, w)  # read by an operation on another stream
    with pytest.raises(ValueError, match="gpu|CPU"):
        _ext.matmul(x, dense, stream=mx.gpu)


def test_products_on_alternating_streams_wait_for_each_other(rng):
    rotation = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    w = Weight(mx.array(rotation.astype(np.float32)))
    streams = [mx.new_stream(mx.cpu) for _ in range(2)]
    x = y = oracle.random_array(rng, 70, 64)
    for i in range(30):
        with mx.stream(streams[i % 2]):
            y = linear(y, w)
    expected = oracle.wide(x) @ np.linalg.matrix_power(oracle.wide(w.values).T, 30)
    assert np.abs(oracle.wide(y) - expected).max() < 1e-4


def test_long_lazy_chains(rng):
    rotation = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    w = Weight(mx.array(rotation.astype(np.float32)))
    x = y = oracle.random_array(rng, 5, 64)
    for _ in range(100):
        y = linear(linear(y, w), w, transpose=False)  # there and back
    assert np.abs(oracle.wide(y) - oracle.wide(x)).max() < 1e-4


def test_inputs_may_be_forgotten_before_evaluation(rng):
    # 200 products of temporaries, evaluated at once, while the allocator is free to reuse every buffer that nobody holds.
    kept, results = [], []
    for i in range(200):
        w = oracle.random_weight(rng, 17, 64, BITS[i % len(BITS)], dtype=FLOATS[i % 3])
        x = oracle.random_array(rng, 4, 64, dtype=FLOATS[i % 3])
        kept.append(oracle.product_and_bound(x, w, epsilon=oracle.EPSILON[x.dtype]))
        results.append(linear(x + 0, Weight(w.values + 0, w.scales + 0, w.biases + 0, w.group_size, w.bits)))
    del x, w
    mx.async_eval(results)
    for y, (expected, bound) in zip(results, kept, strict=True):
        assert (np.abs(oracle.wide(y) - expected) <= bound).all()


def test_two_python_threads(rng):
    w = oracle.random_weight(rng, 67, 64)
    xs = [oracle.random_array(rng, 70, 64) for _ in range(2)]
    expected = [linear(x, w) for x in xs]
    mx.eval(expected)
    wrong = []

    def work(i):
        try:
            with use_backend("native"), mx.stream(mx.new_stream(mx.cpu)):
                for _ in range(50):
                    if not mx.array_equal(linear(xs[i], w), expected[i]).item():
                        wrong.append(i)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Prints a hash of the bytes of several products (many rows and few columns, so that rows are shared out; many columns; 16-bit sums), checked first.
PRODUCTS = """
import hashlib
import mlx.core as mx, numpy as np, oracle
from metalens import _ext, use_backend
from metalens.ops import Weight, linear, quantized_matmul
digest = hashlib.sha256()
rng = np.random.default_rng(7)
with use_backend("native"):
    for rows, outputs, inputs in ((1, 1, 32), (201, 33, 384), (13, 1003, 64), (70, 67, 128)):
        for dtype in (mx.float32, mx.float16, mx.bfloat16):
            for transpose in (True, False):
                x = oracle.random_array(rng, rows, inputs if transpose else outputs, dtype=dtype)
                dense = Weight(oracle.random_array(rng, outputs, inputs, dtype=dtype))
                for w in (dense, *(oracle.random_weight(rng, outputs, inputs, bits, 32, dtype) for bits in (2, 3, 4, 5, 6, 8))):
                    y = linear(x, w, transpose)
                    oracle.assert_product(y, x, w, transpose)
                    digest.update(np.array(y.astype(mx.float32)).tobytes())
print(_ext.isa(), _ext.num_threads(), digest.hexdigest())
"""


@pytest.mark.parametrize("isa", _ext.available_isas().split())
def test_every_instruction_set(run_python, isa):
    assert run_python(PRODUCTS, METALENS_ISA=isa).split()[0] == isa


def test_the_number_of_threads_changes_no_bit(run_python):
    printed = [run_python(PRODUCTS, METALENS_NUM_THREADS=str(n)).split() for n in (1, 3)]
    assert [p[1] for p in printed] == ["1", "3"]
    assert printed[0][2] == printed[1][2] != hashlib.sha256().hexdigest()


# ---------------------------------------------------------------------- errors


def arguments(rng, **changes):
    w = oracle.random_weight(rng, 33, 128)
    return {"x": mx.zeros((5, 128)), "w": w.values, "scales": w.scales, "biases": w.biases, "group_size": 32, "bits": 4} | changes


WRONG_QUANTISED = {
    "bits 1": {"bits": 1},
    "bits 7": {"bits": 7},
    "bits 16": {"bits": 16},
    "bits negative": {"bits": -4},
    "other bits than packed": {"bits": 8},
    "group 16": {"group_size": 16},
    "group 48": {"group_size": 48},
    "group 0": {"group_size": 0},
    "other group than packed": {"group_size": 64},
    "x of integers": {"x": mx.zeros((5, 128), dtype=mx.int32)},
    "x of float64": {"x": mx.zeros((5, 128), dtype=mx.float64)},
    "x without axes": {"x": mx.array(1.0)},
    "x too narrow": {"x": mx.zeros((5, 127))},
    "x of the other orientation": {"x": mx.zeros((5, 33))},
    "x for transpose=True": {"transpose": False},
    "w not packed": {"w": mx.zeros((33, 16))},
    "w of three axes": {"w": mx.zeros((1, 33, 16), dtype=mx.uint32)},
    "scales of integers": {"scales": mx.zeros((33, 4), dtype=mx.uint8), "biases": mx.zeros((33, 4), dtype=mx.uint8)},
    "scales and biases of two types": {"biases": mx.zeros((33, 4), dtype=mx.float16)},
    "scales of too few rows": {"scales": mx.zeros((32, 4))},
    "biases of too few groups": {"biases": mx.zeros((33, 3))},
}


@pytest.mark.parametrize("changes", WRONG_QUANTISED.values(), ids=WRONG_QUANTISED)
def test_quantised_arguments_that_do_not_fit(rng, changes):
    with pytest.raises(ValueError, match="metalens"):
        _ext.quantized_matmul(**arguments(rng, **changes))


@pytest.mark.parametrize(
    ("x", "w", "transpose"),
    [
        (mx.zeros((5, 127)), mx.zeros((33, 128)), True),
        (mx.zeros((5, 128)), mx.zeros((33, 128)), False),
        (mx.array(1.0), mx.zeros((33, 128)), True),
        (mx.zeros((5, 128)), mx.zeros((128,)), True),
        (mx.zeros((5, 128)), mx.zeros((2, 33, 128)), True),
        (mx.zeros((5, 128), dtype=mx.int32), mx.zeros((33, 128)), True),
        (mx.zeros((5, 128)), mx.zeros((33, 128), dtype=mx.complex64), True),
    ],
)
def test_dense_arguments_that_do_not_fit(x, w, transpose):
    with pytest.raises(ValueError, match="metalens"):
        _ext.matmul(x, w, transpose)


@pytest.mark.parametrize("name", ["native", "reference"])
def test_both_backends_refuse_the_same(rng, name):
    w = oracle.random_weight(rng, 33, 128)
    with use_backend(name):
        for x, weight in (
            (mx.zeros((5, 96)), w),
            (mx.zeros((5, 96)), Weight(mx.zeros((33, 128)))),
            (mx.zeros((5, 128)), Weight(w.values, w.scales, w.biases, 32, 7)),
            (mx.zeros((5, 128)), Weight(w.values, w.scales, w.biases, 48, 4)),
            (mx.zeros((5, 128)), Weight(w.values, w.scales[:, :2], w.biases[:, :2], 32, 4)),
        ):
            with pytest.raises(ValueError, match=r"\["):
                mx.eval(linear(x, weight))


@pytest.mark.parametrize("argument", [1, 2])
def test_a_quantised_weight_has_no_gradient(rng, argument):
    w = oracle.random_weight(rng, 33, 128)
    parts = [w.values, w.scales, w.biases]

    def function(part):
        replaced = [*parts[:argument], part, *parts[argument + 1 :]]
        return linear(mx.ones((2, 128)), Weight(*replaced, 32, 4))

    with pytest.raises(ValueError, match="frozen"):
        mx.eval(mx.grad(lambda part: mx.sum(function(part)))(parts[argument]))
    with pytest.raises(ValueError, match="frozen"):
        mx.eval(mx.jvp(function, [parts[argument]], [parts[argument]])[1])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_named_operation_takes_its_arguments_by_position(rng, backend):
    w = oracle.random_weight(rng, 33, 128, bits=3, group_size=64)
    x, g = oracle.random_array(rng, 5, 128), oracle.random_array(rng, 5, 33)
    with use_backend(backend):
        oracle.assert_product(quantized_matmul(x, w.values, w.scales, w.biases, 64, 3), x, w, epsilon=1e-5)
        oracle.assert_product(quantized_matmul(g, w.values, w.scales, w.biases, 64, 3, False), g, w, False, epsilon=1e-5)
    oracle.assert_product(_ext.quantized_matmul(x, w.values, w.scales, w.biases, 64, 3), x, w)
