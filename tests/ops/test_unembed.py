import mlx.core as mx
import numpy as np
import pytest

import oracle
from metalens.ops import Head, Weight, head_logits
from metalens.ops.unembed import head_pullback

pytestmark = pytest.mark.usefixtures("each_backend")

TRANSFORMS = {"linear": {}, "scale": {"scale": 0.125}, "softcap": {"softcap": 3.0}, "scale and softcap": {"scale": -1.5, "softcap": 5.0}}


def make_head(rng, quantised, with_bias, **transform):
    weight = oracle.random_weight(rng, 131, 64, scale=0.3) if quantised else Weight(oracle.random_array(rng, 131, 64, scale=0.3))
    return Head(weight, oracle.random_array(rng, 131) if with_bias else None, **transform)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_logits_are_bias_then_scale_then_softcap(rng, quantised, with_bias, transform):
    head = make_head(rng, quantised, with_bias, **transform)
    n = oracle.random_array(rng, 2, 5, 64)
    z = head_logits(n, head)
    assert z.dtype == mx.float32
    np.testing.assert_allclose(oracle.wide(z), oracle.head_logits(oracle.wide(n), head), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("quantised", [False, True])
def test_pullback_is_the_transposed_jacobian(rng, quantised, transform):
    head = make_head(rng, quantised, True, **transform)
    n, dz = oracle.random_array(rng, 3, 64), oracle.random_array(rng, 3, 131)
    ours = oracle.wide(head_pullback(dz, head_logits(n, head), head))
    values = oracle.wide(n)
    for index in [(0, 0), (1, 17), (2, 63), (2, 5)]:
        slope = oracle.central_difference(lambda: np.sum(oracle.head_logits(values, head) * oracle.wide(dz)), values, index)
        assert ours[index] == pytest.approx(slope, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_rows_and_weights_of_16_bits_give_logits_of_32(rng, dtype):
    # Rounded to 16 bits, these logits would be off by 1e-3 (float16) or 1e-2; the KL of a late layer is smaller.
    head = Head(oracle.random_weight(rng, 131, 64, dtype=dtype, scale=0.3), oracle.random_array(rng, 131, dtype=dtype))
    n = oracle.random_array(rng, 7, 64, dtype=dtype)
    z = head_logits(n, head)
    assert z.dtype == mx.float32
    np.testing.assert_allclose(oracle.wide(z), oracle.head_logits(oracle.wide(n), head), atol=2e-5)
    dz = oracle.random_array(rng, 7, 131)
    pulled = head_pullback(dz, z, head)
    assert pulled.dtype == mx.float32
    np.testing.assert_allclose(oracle.wide(pulled), oracle.wide(dz) @ oracle.matrix(head.weight), atol=1e-4)


def test_the_vocabulary_is_what_the_weight_has(rng):
    assert make_head(rng, True, False).vocab_size == make_head(rng, False, False).vocab_size == 131


def test_vocabulary_beyond_16_bits(rng):
    head = Head(oracle.random_weight(rng, 66001, 32, scale=0.3), oracle.random_array(rng, 66001))
    n = oracle.random_array(rng, 2, 32)
    np.testing.assert_allclose(oracle.wide(head_logits(n, head)), oracle.head_logits(oracle.wide(n), head), atol=2e-5)
