"""Residual statistics, against NumPy on the whole and matrices with known spectra."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens import InterpretableModel
from metalens.analysis.residuals import (
    ResidualStatistics,
    covariance_similarity,
    effective_rank,
    residual_statistics,
    rogue_dimensions,
    similarity_matrix,
    transfer_correlation,
)
from support.mocks import DIM, MockModel


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sampled_from([0.0, 1e7]))
def test_parts_of_any_size(sizes, offset):
    x = np.random.default_rng(sum(sizes)).standard_normal((sum(sizes), 3)) + offset
    found = ResidualStatistics(3)
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        found.add(part)
    assert found.count == len(x)
    if len(x) < 2:
        with pytest.raises(ValueError, match="covariance needs two vectors"):
            _ = found.covariance
        return
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-12, atol=1e-12)
    # With an offset of 1e7, sums of squares in float64 would leave errors of 1e-2.
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found.variance, x.var(axis=0, ddof=1), rtol=1e-6, atol=1e-7)
    assert found.mean_norm == pytest.approx(np.linalg.norm(x, axis=1).mean())


def test_joined_statistics(rng):
    x = rng.standard_normal((11, 4))
    a, b = ResidualStatistics(4), ResidualStatistics(4)
    a.add(x[:3])
    b.add(mx.array(x[3:].astype(np.float32)))
    a.merge(b)
    a.merge(ResidualStatistics(4))
    np.testing.assert_allclose(a.covariance, np.cov(x.T), rtol=1e-5)


def test_vectors_that_do_not_fit():
    found = ResidualStatistics(4)
    with pytest.raises(ValueError, match=r"vectors \[N, 4\]"):
        found.add(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="NaN or infinite"):
        found.add(np.full((2, 4), np.nan))
    with pytest.raises(ValueError, match="width 4 and 3"):
        found.merge(ResidualStatistics(3))


def test_the_hidden_states_of_a_model(rng):
    model = InterpretableModel(MockModel(), accelerate=False)
    text = [rng.integers(0, 100, length) for length in (9, 4)]
    found = residual_statistics(model, text, layers=[0, -1], max_seq_len=9, skip=2)
    assert list(found) == ["embedding", 0, 2]
    captured = [model.source.capture(mx.array(ids)[None], with_embedding=True) for ids in text]
    for layer, stats in found.items():
        x = np.concatenate([np.array(s.embedding if layer == "embedding" else s.hidden[layer])[0, 2:] for s in captured]).astype(np.float64)
        assert stats.count == 9
        np.testing.assert_allclose(stats.mean, x.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats.covariance, np.cov(x.T), rtol=1e-4, atol=1e-6)
    assert list(residual_statistics(model, text, embedding=False)) == [0, 1, 2]
    with pytest.raises(ValueError, match="after the first 8 of each sequence"):
        residual_statistics(model, text, skip=8)
    with pytest.raises(ValueError, match="skip must be 0 or more"):
        residual_statistics(model, text, skip=-1)


def with_deviations(rng, deviations, count=400):
    found = ResidualStatistics(len(deviations))
    found.add(rng.standard_normal((count, len(deviations))) * deviations)
    return found


def test_planted_rogue_dimensions(rng):
    deviations = np.ones(DIM)
    deviations[[5, 20]] = 30, 100
    found = with_deviations(rng, deviations)
    assert rogue_dimensions(found) == [20, 5]
    assert rogue_dimensions(found, factor=50) == [20]
    assert rogue_dimensions(with_deviations(rng, np.ones(DIM))) == []


def test_the_effective_rank():
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.diag([3.0, 3.0, 0.0])) == pytest.approx(2)
    assert effective_rank(np.diag([1.0, 3.0])) == pytest.approx(math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75))))
    assert effective_rank(np.zeros((3, 3))) == 0.0


def test_covariance_similarity(rng):
    a, b = (m @ m.T for m in rng.standard_normal((2, 5, 5)))
    assert covariance_similarity(a, 3 * a) == pytest.approx(1)
    assert covariance_similarity(a, b) == pytest.approx(np.trace(a @ b) / math.sqrt(np.trace(a @ a) * np.trace(b @ b)))
    assert covariance_similarity(np.diag([1.0, 0]), np.diag([0, 1.0])) == 0
    assert math.isnan(covariance_similarity(a, np.zeros((5, 5))))
    kept = np.delete(np.delete(a, 2, 0), 2, 1), np.delete(np.delete(b, 2, 0), 2, 1)
    assert covariance_similarity(a, b, [2]) == pytest.approx(covariance_similarity(*kept))


def test_rogue_dimensions_hide_differences(rng):
    """Two layers that share a rogue dimension only look alike until it is left out."""
    shape = np.ones(DIM)
    shape[: DIM // 2] = 3
    a, b = (np.where(np.arange(DIM) == 9, 100, each) for each in (shape, shape[::-1]))
    layers = [with_deviations(rng, each, 4000) for each in (a, b)]
    assert similarity_matrix(layers)[0, 1] > 0.99
    without = similarity_matrix(layers, rogue_dimensions(layers[0]))
    assert without[0, 1] < 0.4
    assert without[0, 1] == without[1, 0]
    assert without[0, 0] == 1


def test_the_correlation_with_transfer(rng):
    layers = 9
    similarity = rng.random((layers, layers))
    penalty = -similarity + 0.5 * (similarity < 0.1)  # the diagonal must not count
    np.fill_diagonal(similarity, 1)
    np.fill_diagonal(penalty, 10)
    found = transfer_correlation(similarity, penalty, resamples=200)
    assert found.value < -0.6
    assert found.low <= found.value <= found.high < 0
    assert transfer_correlation(similarity, similarity, resamples=20).value == pytest.approx(1)
    with pytest.raises(ValueError, match="one shape"):
        transfer_correlation(similarity, penalty[1:])
