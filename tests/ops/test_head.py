import mlx.core as mx
import numpy as np
import pytest

from metalens.ops import Head, Weight, head_logits
from metalens.ops.dispatch import operations
from metalens.ops.logits import capped_logits, head_vjp
from support import oracle

pytestmark = pytest.mark.usefixtures("cpu_backend")

TRANSFORMS = {"linear": {}, "scale": {"scale": 0.125}, "softcap": {"softcap": 3.0}, "scale and softcap": {"scale": -1.5, "softcap": 5.0}}


def make_head(rng, quantized, with_bias, **transform):
    weight = oracle.random_weight(rng, 131, 64, scale=0.3) if quantized else Weight(oracle.random_array(rng, 131, 64, scale=0.3))
    return Head(weight, oracle.random_array(rng, 131) if with_bias else None, **transform)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_logits_are_bias_then_scale_then_softcap(rng, quantized, with_bias, transform):
    head = make_head(rng, quantized, with_bias, **transform)
    n = oracle.random_array(rng, 2, 5, 64)
    z = head_logits(n, head)
    assert z.dtype == mx.float32
    np.testing.assert_allclose(oracle.wide(z), oracle.head_logits(oracle.wide(n), head), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("quantized", [False, True])
def test_the_vjp_is_the_transposed_jacobian(rng, quantized, transform):
    head = make_head(rng, quantized, True, **transform)
    n, dz = oracle.random_array(rng, 3, 64), oracle.random_array(rng, 3, 131)
    ours = oracle.wide(head_vjp(dz, capped_logits(n, head), head))
    values = oracle.wide(n)
    for index in [(0, 0), (1, 17), (2, 63), (2, 5)]:
        slope = oracle.central_difference(lambda: np.sum(oracle.head_logits(values, head) * oracle.wide(dz)), values, index)
        assert ours[index] == pytest.approx(slope, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_rows_and_weights_of_16_bits_give_logits_of_32(rng, dtype):
    # Rounding to 16 bits would change these logits by 1e-3 (float16) or 1e-2 (bfloat16); the KL of a late layer is smaller.
    head = Head(oracle.random_weight(rng, 131, 64, dtype=dtype, scale=0.3), oracle.random_array(rng, 131, dtype=dtype))
    n = oracle.random_array(rng, 7, 64, dtype=dtype)
    z = head_logits(n, head)
    assert z.dtype == mx.float32
    np.testing.assert_allclose(oracle.wide(z), oracle.head_logits(oracle.wide(n), head), atol=2e-5)
    dz = oracle.random_array(rng, 7, 131)
    gradient = head_vjp(dz, z, head)
    assert gradient.dtype == mx.float32
    np.testing.assert_allclose(oracle.wide(gradient), oracle.wide(dz) @ oracle.matrix(head.weight), atol=1e-4)


def test_the_vocabulary_is_what_the_weight_has(rng):
    assert make_head(rng, True, False).vocab_size == make_head(rng, False, False).vocab_size == 131


def test_vocabulary_beyond_16_bits(rng):
    head = Head(oracle.random_weight(rng, 66001, 32, scale=0.3), oracle.random_array(rng, 66001))
    n = oracle.random_array(rng, 2, 32)
    np.testing.assert_allclose(oracle.wide(head_logits(n, head)), oracle.head_logits(oracle.wide(n), head), atol=2e-5)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("quantized", [False, True])
def test_padding_rows_have_logits_of_minus_infinity_and_no_gradient(rng, quantized, transform):
    head = make_head(rng, quantized, True, **transform, used_rows=100)
    whole = Head(head.weight, head.bias, head.scale, head.softcap)
    assert (head.vocab_size, head.tokens, whole.tokens) == (131, 100, 131)
    n, dz = oracle.random_array(rng, 3, 64), oracle.random_array(rng, 3, 131)
    z, of_whole = head_logits(n, head), head_logits(n, whole)
    assert mx.array_equal(z[:, :100], of_whole[:, :100])
    assert np.isneginf(oracle.wide(z[:, 100:])).all()
    dz = mx.where(mx.arange(131) < 100, dz, 0)  # the probability of an impossible token can't change
    gradients = [oracle.wide(head_vjp(dz, capped_logits(n, h), h)) for h in (head, whole)]
    np.testing.assert_allclose(*gradients, atol=1e-5)


@pytest.mark.parametrize("used", [1, 131])
def test_any_number_of_used_rows(rng, used):
    head = Head(oracle.random_weight(rng, 131, 64), used_rows=used)
    assert head.tokens == used
    assert np.isfinite(oracle.wide(head_logits(oracle.random_array(rng, 2, 64), head))).sum() == 2 * used


@pytest.mark.parametrize("used", [-1, 0, 132])
def test_numbers_of_used_rows_that_the_head_does_not_have(rng, used):
    with pytest.raises(ValueError, match=f"used_rows must be from 1 to the head's 131 rows, got {used}"):
        Head(oracle.random_weight(rng, 131, 64), used_rows=used)


@pytest.mark.parametrize("mode", oracle.FLOAT_MODES)
def test_heads_of_the_8_bit_scaled_formats(rng, mode):
    head = Head(oracle.random_float_weight(rng, 131, 64, mode), oracle.random_array(rng, 131))
    n, dz = oracle.random_array(rng, 7, 64), oracle.random_array(rng, 7, 131)
    size = np.abs(oracle.matrix(head.weight)).max()
    z = head_logits(n, head)
    np.testing.assert_allclose(oracle.wide(z), oracle.head_logits(oracle.wide(n), head), atol=1e-4 * size)
    np.testing.assert_allclose(oracle.wide(head_vjp(dz, z, head)), oracle.wide(dz) @ oracle.matrix(head.weight), atol=1e-4 * size)


@pytest.mark.parametrize("name", ["lens_stats", "lens_target", "lens_kl"])
def test_formats_that_the_kernels_do_not_read_have_no_native_head(rng, cpu_backend, name):
    w, rows = oracle.random_weight(rng, 131, 64), oracle.random_array(rng, 1, 3, 64)

    def backend(weight):
        head = Head(weight)
        arguments = {"lens_stats": (rows, head, 1, None, None), "lens_target": (rows[0], head), "lens_kl": (rows, None, head)}
        return operations()[name].select(*arguments[name])[0].backend

    assert backend(w) == cpu_backend
    assert backend(Weight(w.values, w.scales, w.biases.astype(mx.float16), 32, 4)) == "reference"
    assert backend(Weight(mx.zeros((3, 4), dtype=mx.int32))) == "reference"
