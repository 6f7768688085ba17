"""linear and quantized_matmul: rejected arguments, their messages, and arguments by position."""

import mlx.core as mx
import pytest

from metalens import _ext, use_backend
from metalens.ops import Weight, linear, quantized_matmul
from support import oracle

pytestmark = pytest.mark.usefixtures("native")


def arguments(rng, **changes):
    w = oracle.random_weight(rng, 33, 128)
    return {"x": mx.zeros((5, 128)), "w": w.values, "scales": w.scales, "biases": w.biases, "group_size": 32, "bits": 4} | changes


WRONG_QUANTIZED = {
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
    "no biases": {"biases": None},
    "biases where the mode has none": {"mode": "mxfp4", "scales": mx.zeros((33, 4), dtype=mx.uint8)},
    "scales of floats where the mode has bytes": {"mode": "mxfp4", "biases": None},
    "mxfp4 of 8 bits": {"mode": "mxfp4", "biases": None, "scales": mx.zeros((33, 4), dtype=mx.uint8), "bits": 8},
    "nvfp4 in groups of 32": {"mode": "nvfp4", "biases": None, "scales": mx.zeros((33, 4), dtype=mx.uint8)},
    "another mode": {"mode": "int4"},
    "a result of integers": {"dtype": mx.int32},
    "another precision": {"precision": "fp8"},
}


@pytest.mark.parametrize("changes", WRONG_QUANTIZED.values(), ids=WRONG_QUANTIZED)
def test_quantized_arguments_that_do_not_fit(rng, changes):
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
def test_a_quantized_weight_has_no_gradient(rng, argument):
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
