"""Ablation of subspaces and blocks, against projections in float64 and models computed by hand."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens.analysis.ablation import ablate_block, ablate_subspace, derangement, orthonormal_basis, remove_subspace, replacement_of
from metalens.models.capture import ResidualCapture
from support.mocks import DIM, MockModel

IDS = mx.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def ablated(h, vectors, replacement):
    """h + P (replacement - h), with P = A (A^T A)^-1 A^T, in float64."""
    a = np.atleast_2d(vectors).T
    return h + (replacement - h) @ (a @ np.linalg.solve(a.T @ a, a.T)).T


@given(st.integers(0, 30), st.integers(1, 4))
def test_an_orthonormal_basis(seed, count):
    vectors = np.random.default_rng(seed).standard_normal((count, 5)) * 10.0 ** np.arange(-count, 0)[:, None]
    basis = orthonormal_basis(vectors)
    np.testing.assert_allclose(basis @ basis.T, np.eye(count), atol=1e-12)
    # Row j lies in the span of the first j vectors, and points the way of vector j.
    mixed = vectors @ basis.T
    np.testing.assert_allclose(np.triu(mixed, 1), 0, atol=1e-12)
    assert (np.diag(mixed) > 0).all()


@pytest.mark.parametrize("vectors", [np.zeros(4), [[1.0, 2.0], [2.0, 4.0]], np.eye(3)[:, :2], [[1.0, np.nan]], np.zeros((0, 3)), np.ones((1, 2, 2))])
def test_vectors_that_span_too_little(vectors):
    with pytest.raises(ValueError, match=r"subspace needs finite vectors|linearly dependent"):
        orthonormal_basis(vectors)


@given(st.integers(2, 40), st.integers(0, 5))
def test_a_derangement_moves_everything(size, seed):
    order = derangement(size, seed)
    assert sorted(order) == list(range(size))
    assert (order != np.arange(size)).all()
    np.testing.assert_array_equal(order, derangement(size, seed))


def test_one_vector_can_not_be_resampled():
    with pytest.raises(ValueError, match="at least two vectors"):
        derangement(1)


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
@pytest.mark.parametrize("count", [1, 3])
def test_subspaces_in_the_running_model(rng, mode, count):
    model = MockModel()
    source = ResidualCapture(model)
    vectors = rng.standard_normal((count, DIM))
    intact = source.capture(IDS).hidden[1]
    found = source.capture(IDS, {1: ablate_subspace(vectors, mode, seed=4)}).hidden
    h = np.array(intact).astype(np.float64).reshape(-1, DIM)
    replacement = {"zero": 0 * h, "mean": np.broadcast_to(h.mean(axis=0), h.shape), "resample": h[derangement(len(h), 4)]}[mode]
    expected = ablated(h, vectors, replacement).reshape(2, 5, DIM)
    np.testing.assert_allclose(np.array(found[1]), expected, rtol=1e-5, atol=1e-5)
    # Later blocks read what the ablation has left.
    np.testing.assert_allclose(np.array(found[2]), np.array(model.layers[2](mx.array(expected.astype(np.float32)))), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.array(found[0]), np.array(source.capture(IDS).hidden[0]))


def test_a_given_mean(rng):
    mean, vector = rng.standard_normal(DIM), rng.standard_normal(DIM)
    h = mx.array(rng.standard_normal((2, 5, DIM)).astype(np.float32))
    found = np.array(ablate_subspace(vector, "mean", mean=mean)(h))
    np.testing.assert_allclose(found @ vector, np.full((2, 5), mean @ vector), rtol=1e-4, atol=1e-4)


def test_the_type_of_the_model_stays(rng):
    h = mx.array(rng.standard_normal((2, 5, 8)).astype(np.float32)).astype(mx.bfloat16)
    assert ablate_subspace(rng.standard_normal(8))(h).dtype == mx.bfloat16
    assert ablate_block("mean").function(h, 2 * h).dtype == mx.bfloat16


def test_a_full_subspace_leaves_the_replacement(rng):
    h = mx.array(rng.standard_normal((3, 4)).astype(np.float32))
    np.testing.assert_allclose(np.array(remove_subspace(h, mx.eye(4))), 0, atol=1e-6)
    np.testing.assert_allclose(np.array(remove_subspace(h, mx.eye(4), 2 * h)), np.array(2 * h), rtol=1e-5)


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_blocks_in_the_running_model(mode):
    model = MockModel()
    source = ResidualCapture(model)
    intact = source.capture(IDS).hidden
    given_, output = (np.array(h).astype(np.float64) for h in intact[:2])
    added = (output - given_).reshape(-1, DIM)
    part = {"zero": 0 * added, "mean": np.broadcast_to(added.mean(axis=0), added.shape), "resample": added[derangement(len(added), 7)]}[mode]
    found = source.capture(IDS, {1: ablate_block(mode, seed=7)}).hidden
    np.testing.assert_allclose(np.array(found[1]), given_ + part.reshape(output.shape), rtol=1e-5, atol=1e-5)


def test_two_deleted_blocks_leave_the_embedding():
    model = MockModel()
    found = ResidualCapture(model).capture(IDS, {0: ablate_block(), 1: ablate_block()}).hidden
    np.testing.assert_array_equal(np.array(found[1]), np.array(model.embed_tokens(IDS)))


def test_what_can_not_be_ablated(rng):
    with pytest.raises(ValueError, match="no ablation 'mode'; there are mean, zero, resample"):
        ablate_subspace(np.ones(3), "mode")
    with pytest.raises(ValueError, match="no ablation 'mode'"):
        ablate_block("mode")
    with pytest.raises(ValueError, match="width 3, and the residual stream has width 32"):
        ResidualCapture(MockModel()).capture(IDS, {0: ablate_subspace(np.ones(3))})
    with pytest.raises(ValueError, match=r"mean of vectors of width 4 must be \(4,\)"):
        replacement_of(mx.zeros((2, 4)), "mean", mean=mx.zeros((3,)))
