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
    labels = rng.integers(0, 131, (tokens, 10))  # more than the simdgroups of a threadgroup
    labels[0, :3] = -1, 131, 2**40  # no tokens
    labels = mx.array(labels)
    with use_backend("reference"):
        expected = vars(lens_stats(n, head, 3, n_model, labels, reverse=True))
        mx.eval(expected)
    with emulated():
        found = vars(lens_stats(n, head, 3, n_model, labels, reverse=True))
        mx.eval(found)
    assert np.isnan(np.array(found["nll"])[:, 0, :3]).all()
    for name in ("top_ids", "rank", "agrees"):
        assert np.array_equal(np.array(found[name]), np.array(expected[name])), name
    for name in ("lse", "entropy", "max_probability", "top_logits", "kl", "nll", "reverse_kl"):
        np.testing.assert_allclose(np.array(found[name]), np.array(expected[name]), rtol=2e-5, atol=3e-6, err_msg=name)


def test_labels_without_a_model_and_rows_with_nan(rng):
    # Without a model the rows of all layers are tokens of one layer, and every layer has the labels of its tokens.
    head, n, labels = oracle.make_head(rng, 131, 64), oracle.random_array(rng, 2, 3, 64), mx.array(rng.integers(0, 131, (3, 2)))
    n[1, 2, 5] = mx.nan
    with emulated():
        found = lens_stats(n, head, 1, None, labels)
        nll, rank = oracle.wide(found.nll), np.array(found.rank)
    z = oracle.head_logits(oracle.wide(n), head)
    of_label = np.take_along_axis(z, np.array(labels)[None].repeat(2, 0), axis=-1)
    expected = 1 + np.sum(z[..., None, :] > of_label[..., None], axis=-1)
    lost = np.zeros((2, 3), bool)
    lost[1, 2] = True
    assert (np.isnan(nll).all(-1) == lost).all()
    np.testing.assert_array_equal(rank[~lost], expected[~lost])


@pytest.mark.parametrize("distance", [1e-3, 0.1, 3.0])
def test_the_reverse_kl_of_rows_near_and_far(rng, distance):
    head, n_model = oracle.make_head(rng, 131, 64), oracle.random_array(rng, 3, 64)
    n = n_model[None] + oracle.random_array(rng, 2, 3, 64, scale=distance / 8)
    with emulated():
        found = lens_stats(n, head, 1, n_model, reverse=True)
        ours = [oracle.wide(found.kl), oracle.wide(found.reverse_kl)]
    z, z_model = oracle.head_logits(oracle.wide(n), head), oracle.head_logits(oracle.wide(n_model), head)[None]
    for values, expected in zip(ours, (oracle.kl(z_model, z), oracle.kl(z, z_model)), strict=True):
        assert (np.abs(values - expected) <= 3e-6 * np.sqrt(expected) + 2e-6 * expected).all()
