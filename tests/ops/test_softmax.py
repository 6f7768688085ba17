import mlx.core as mx
import numpy as np
import pytest

from metalens.ops.softmax import BLOCK, entropy, kl_divergence, log_softmax_and_lse, row_sum
from support import oracle


@pytest.mark.parametrize("v", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 128_256, 131_071])
def test_sums_stay_exact_whatever_the_length(v):
    # 0.1 is not a float32: a sum from end to end drifts by one rounding per term, in one direction. That is allowed for 256 terms, not for 131071.
    x = mx.full((2, v), 0.1)
    np.testing.assert_allclose(oracle.wide(row_sum(x)), np.full(2, v * float(np.float32(0.1))), rtol=5e-6)


def test_entropy_of_a_flat_row_and_of_a_certain_one():
    log_p, p, _ = log_softmax_and_lse(mx.zeros((1, 128_256)))
    assert entropy(p, log_p).item() == pytest.approx(np.log(128_256), abs=1e-5)
    certain = mx.array([[0.0, -float("inf")]])
    log_p, p, _ = log_softmax_and_lse(certain)
    assert entropy(p, log_p).item() == 0


def test_softmax_of_one_exp(rng):
    z = oracle.random_array(rng, 3, 7, scale=20)
    z[0, 2] = -float("inf")  # not in column 0, from which the log-sum-exp is computed below
    log_p, p, lse = log_softmax_and_lse(z)
    expected = oracle.log_softmax(oracle.wide(z))
    np.testing.assert_allclose(oracle.wide(log_p), expected, atol=1e-5)
    np.testing.assert_allclose(oracle.wide(p), np.exp(expected), atol=1e-6)
    np.testing.assert_allclose(oracle.wide(lse), oracle.wide(z)[:, 0] - expected[:, 0], rtol=1e-6)


def test_kl_is_infinite_where_the_lens_rules_out_what_the_model_says():
    zero, half = -float("inf"), float(np.log(0.5))
    kl = kl_divergence(mx.array([0.5, 0.5]), mx.array([half, half]), mx.array([0.0, zero]))
    assert kl.item() == float("inf")
