import hashlib
import threading

import mlx.core as mx
import numpy as np
import pytest

from metalens import _ext, use_backend
from metalens.ops import Weight, linear
from support import oracle

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
BITS = [2, 3, 4, 5, 6, 8]

pytestmark = pytest.mark.usefixtures("native")


def plain(x, w, transpose=True):
    """Return the same product in plain MLX, which is differentiable too."""
    if w.scales is None:
        return x @ (w.values.T if transpose else w.values)
    return mx.quantized_matmul(x, w.values, w.scales, w.biases, transpose, w.group_size, w.bits)


# ---------------------------------------------------------------------- transformations


def weights(rng):
    """Make a square weight of each kind, so that both orientations accept the same x."""
    return [Weight(oracle.random_array(rng, 64, 64, scale=0.1)), oracle.random_weight(rng, 64, 64, scale=0.1)]


def assert_close(ours, theirs, tolerance=1e-5):
    """Compare relative to the largest element: gradients are sums in which small elements cancel."""
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
    dx, dw = mx.grad(lambda x, w: mx.sum(linear(x, Weight(w))), argnums=(0, 1))(x, w[0].values)  # the product is float32
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
        for rows in (3, 8, 3):  # another shape, then the first one from the cache
            x = oracle.random_array(rng, rows, 64)
            for ours, eager in zip(compiled(x), function(x), strict=True):
                assert mx.array_equal(ours, eager)


def test_compiled_gradient(rng):
    x = oracle.random_array(rng, 3, 64)
    for w in weights(rng):
        gradient = mx.grad(lambda x, w=w: mx.sum(mx.square(linear(x, w))))
        assert_close(mx.compile(gradient)(x), gradient(x), 1e-6)


def test_compile_does_not_merge_products_that_differ(rng):
    # The same inputs in the other orientation, and read as 4-bit codes in groups of 64 or as 8-bit codes in groups of 32. MLX merges only nodes that
    # depend on arguments and are not results themselves: hence the minus signs.
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
    # 200 products of temporaries, evaluated together, while the allocator may reuse every buffer without an owner.
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


# Check several products and print a hash of their bytes: many rows and few columns, so that threads split the rows; many columns; 16-bit results.
PRODUCTS = """
import hashlib
import mlx.core as mx, numpy as np
from support import oracle
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
