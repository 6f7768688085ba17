"""lens_stats: the reverse KL, and several labels for each token."""

import mlx.core as mx
import numpy as np
import pytest

from metalens.ops import lens_stats
from support import oracle

pytestmark = pytest.mark.usefixtures("cpu_backend")

V, D, L, N, C = 131, 64, 3, 5, 4
ABSOLUTE = 2e-5


def make_input(rng, layers=L, tokens=N):
    n, n_model = oracle.random_array(rng, layers, tokens, D), oracle.random_array(rng, tokens, D)
    return n, n_model, mx.array(rng.integers(0, V, (tokens, C)))


@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
def test_the_reverse_kl(rng, settings):
    head, (n, n_model, _) = oracle.make_head(rng, V, D, **settings), make_input(rng)
    found = lens_stats(n, head, 2, n_model, reverse=True)
    z, z_model = (oracle.head_logits(oracle.wide(rows), head) for rows in (n, n_model))
    np.testing.assert_allclose(oracle.wide(found.reverse_kl), oracle.kl(z, z_model), atol=ABSOLUTE, rtol=ABSOLUTE)
    np.testing.assert_allclose(oracle.wide(found.kl), oracle.kl(z_model, z), atol=ABSOLUTE, rtol=ABSOLUTE)


@pytest.mark.parametrize(("layers", "tokens"), [(1, 1), (2, 1), (90, 4), (2, 300)])
def test_several_labels_are_as_each_alone(rng, layers, tokens):
    head, (n, n_model, labels) = oracle.make_head(rng, V, D), make_input(rng, layers, tokens)
    labels[0, 1] = V  # no token
    together = lens_stats(n, head, 1, n_model, labels, reverse=True)
    assert together.nll.shape == together.rank.shape == (layers, tokens, C)
    for i in range(C):
        alone = lens_stats(n, head, 1, n_model, labels[:, i])
        np.testing.assert_array_equal(np.array(together.rank[..., i]), np.array(alone.rank))
        np.testing.assert_allclose(oracle.wide(together.nll[..., i]), oracle.wide(alone.nll), rtol=1e-6)
    assert np.isnan(oracle.wide(together.nll)[:, 0, 1]).all()
    z = oracle.head_logits(oracle.wide(n), head)
    of_label = np.take_along_axis(-oracle.log_softmax(z), np.array(labels % V)[None].repeat(layers, 0), axis=-1)
    np.testing.assert_allclose(oracle.wide(together.nll)[:, 1:], of_label[:, 1:], atol=ABSOLUTE, rtol=ABSOLUTE)


def test_a_large_vocabulary_is_split_and_merged(rng):
    head, (n, n_model, _) = oracle.make_head(rng, 3001, D), make_input(rng)
    labels = mx.array(rng.integers(0, 3001, (N, 2)))
    found = lens_stats(n, head, 1, n_model, labels, reverse=True)
    z, z_model = (oracle.head_logits(oracle.wide(rows), head) for rows in (n, n_model))
    np.testing.assert_allclose(oracle.wide(found.reverse_kl), oracle.kl(z, z_model), atol=ABSOLUTE, rtol=ABSOLUTE)
    of_label = np.take_along_axis(z, np.array(labels)[None].repeat(L, 0), axis=-1)
    above = (z[..., None, :] > of_label[..., None]).sum(-1)
    close = (np.abs(z[..., None, :] - of_label[..., None]) < ABSOLUTE).sum(-1) - 1
    assert (np.abs(np.array(found.rank) - 1 - above) <= close).all()


def test_nothing_is_added_unasked(rng):
    head, (n, n_model, labels) = oracle.make_head(rng, V, D), make_input(rng)
    assert lens_stats(n, head, 1, n_model, labels).reverse_kl is None
    none = lens_stats(n[:0], head, 1, n_model, labels, reverse=True)
    assert (none.reverse_kl.shape, none.nll.shape, none.rank.shape) == ((0, N), (0, N, C), (0, N, C))


def test_wrong_arguments(rng):
    head, (n, n_model, labels) = oracle.make_head(rng, V, D), make_input(rng)
    with pytest.raises(ValueError, match=r"lens_stats\(reverse=True\) needs n_model"):
        lens_stats(n, head, 1, reverse=True)
    for wrong in (labels[:2], labels[..., None], labels[:, :0], labels.astype(mx.float32)):
        with pytest.raises(ValueError, match=r"labels must be \(5,\) token ids"):
            lens_stats(n, head, 1, n_model, wrong)
