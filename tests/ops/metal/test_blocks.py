"""Test statistics whose rows are divided in unusual ways: two blocks of the kernel for few rows, and blocks of whole tokens, which repeat no row."""

import mlx.core as mx
import numpy as np
import pytest

from metalens.ops import lens_stats, use_backend
from metalens.ops.metal import tuning
from support import oracle
from support.metal_emulation import M1, emulated, needs_clang

pytestmark = needs_clang


@pytest.mark.parametrize(
    ("layers", "tokens", "is_vector", "count", "repeat_slots"),
    [
        (1, 8, True, 2, 0),  # a token's two rows divide the block of eight
        (3, 4, True, 2, 0),
        (4, 2, True, 2, 1),  # five rows do not: the second block repeats the model's row
        (3, 20, False, 2, 0),  # ten tokens for each block of 40 rows
        (4, 9, False, 2, 1),
    ],
)
def test_every_division_gives_the_same_statistics(rng, layers, tokens, is_vector, count, repeat_slots):
    blocks = tuning.blocks(layers, tokens, True, M1.generation)
    assert (blocks.is_vector, blocks.count, blocks.repeat_slots) == (is_vector, count, repeat_slots)
    head = oracle.make_head(rng, 131, 64, bias=True)
    n_model = oracle.random_array(rng, tokens, 64)
    n = n_model[None] + oracle.random_array(rng, layers, tokens, 64, scale=0.3)
    labels = mx.array(rng.integers(0, 131, tokens))
    with use_backend("reference"):
        expected = vars(lens_stats(n, head, 3, n_model, labels))
        mx.eval(expected)
    with emulated():
        found = vars(lens_stats(n, head, 3, n_model, labels))
        mx.eval(found)
    for name in ("top_ids", "rank", "agrees"):
        assert np.array_equal(np.array(found[name]), np.array(expected[name])), name
    for name in ("lse", "entropy", "max_probability", "top_logits", "kl", "nll"):
        np.testing.assert_allclose(np.array(found[name]), np.array(expected[name]), rtol=2e-5, atol=3e-6, err_msg=name)
