"""The paper's analyses beside those of tuned-lens v0.0.3, whose numbers data/make_tuned_lens_v003.py has written; and where v0.0.3 is wrong."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from metalens import LogitLens
from metalens.analysis import (
    ResidualStatistics,
    aitchison_similarity,
    calibration_error,
    effective_rank,
    gaussian_wasserstein,
    gaussian_wasserstein_to_origin,
    orthonormal_basis,
    remove_subspace,
    spearman,
)
from metalens.analysis.ablation import replacement_of
from metalens.analysis.lens_energy import LensEnergy
from metalens.analysis.sphere import maximize_on_sphere
from metalens.evaluation.marginals import LogitSums
from metalens.ops import Head, Norm, Weight, lens_compare

RECORDED = json.loads(Path(__file__).with_name("data").joinpath("tuned_lens_v003.json").read_text(encoding="utf-8"))
GIVEN = {name: np.array(value) for name, value in RECORDED["inputs"].items()}
THEIRS = RECORDED["results"]


def array(name):
    return mx.array(GIVEN[name].astype(np.float32))


def residual(name):
    found = ResidualStatistics(GIVEN[name].shape[1])
    for part in np.split(GIVEN[name], [7, 8]):  # other parts than upstream's
        found.add(part)
    return found


def identity_head():
    """A head whose logits are its rows."""
    return Head(Weight(mx.eye(9)))


def test_these_are_numbers_of_v003():
    assert RECORDED["versions"]["tuned-lens"] == "0.0.3"


@pytest.mark.parametrize("name", ["x", "y"])
def test_residual_statistics(name):
    ours, theirs = residual(name), THEIRS[f"residual_{name}"]
    np.testing.assert_allclose(ours.mean, theirs["mean"], rtol=1e-8)
    np.testing.assert_allclose(ours.covariance, theirs["covariance"], rtol=1e-8, atol=1e-9)
    assert ours.mean_norm == pytest.approx(theirs["mean_norm"], rel=1e-8)


def test_effective_rank_and_wasserstein_distances():
    x, y = residual("x"), residual("y")
    assert effective_rank(x.covariance) == pytest.approx(THEIRS["effective_rank"], rel=1e-8)
    assert gaussian_wasserstein(x, y) == pytest.approx(THEIRS["wasserstein"], rel=1e-7)
    assert gaussian_wasserstein_to_origin(x) == pytest.approx(THEIRS["wasserstein_to_origin"], rel=1e-8)


def test_aitchison_similarity():
    ours = aitchison_similarity(array("logits_p"), array("logits_q"), array("weights"))  # logits and log-probabilities differ by a constant
    np.testing.assert_allclose(np.array(ours), THEIRS["aitchison_similarity"], atol=2e-6)


def test_divergences():
    ours = lens_compare(array("logits_p")[None], array("logits_q")[None], identity_head())
    np.testing.assert_allclose(np.array(ours.kl)[0], THEIRS["kl_divergence"], rtol=1e-5)
    np.testing.assert_allclose(np.array(ours.js)[0], THEIRS["js_divergence"], rtol=1e-5)


def test_marginals():
    sums = LogitSums(1, identity_head())
    for part in (slice(0, 1), slice(1, 5)):
        sums.add(array("logits_p")[None, part])
    np.testing.assert_allclose(sums.means().marginal_probs[0], THEIRS["marginal_probs"], rtol=1e-5)
    np.testing.assert_allclose(sums.means().sufficient_stats[0], THEIRS["sufficient_stats"], rtol=1e-5)


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_subspace_ablation(mode):
    x = array("x")
    ours = remove_subspace(x, mx.array(orthonormal_basis(GIVEN["basis"]).astype(np.float32)), replacement_of(x, mode))
    np.testing.assert_allclose(np.array(ours), THEIRS[f"{mode}_ablation"], atol=2e-5)


def test_calibration_error():
    ours = calibration_error(GIVEN["confidence"], GIVEN["correct"], norm=2)
    assert ours == pytest.approx(THEIRS["calibration"]["ece"], rel=1e-6)
    assert ours == pytest.approx(calibration_error(GIVEN["confidence"], GIVEN["correct"], THEIRS["calibration"]["bins"], norm=2))


def energy():
    """The energies of directions under the decoder that upstream's search had: a layer norm without weights, and a linear head."""

    def layer_norm(h):
        return mx.fast.layer_norm(h, None, None, 1e-5)

    head = Head(Weight(array("unembedding")), array("unembedding_bias"))
    return LensEnergy(SimpleNamespace(norm=Norm(layer_norm, "layer", None, None, 1e-5), head=head), LogitLens(), {0: array("hidden")})


def test_energies_of_upstream_s_causal_basis():
    vectors = np.array(THEIRS["causal"]["vectors"])
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(energy().of_directions(0, vectors), THEIRS["causal"]["energies_of_vectors"], rtol=2e-5)
    np.testing.assert_allclose(THEIRS["causal"]["energies"], THEIRS["causal"]["energies_of_vectors"], rtol=1e-5)


def highest(start):
    """The energy where our search ends that begins at a direction."""
    value, search = energy(), maximize_on_sphere(np.array(start), np.zeros((0, 6)), max_evaluations=200, tolerance=1e-7)
    point = next(search)
    while True:
        try:
            point = search.send(value({0: point})[0])
        except StopIteration as end:
            return end.value.value


def test_no_search_ends_below_where_upstream_s_do():
    for vector, theirs in zip(THEIRS["causal"]["vectors"], THEIRS["causal"]["energies_of_vectors"], strict=True):
        assert highest(vector) >= theirs * (1 - 1e-5)
    starts = np.linalg.svd(GIVEN["unembedding"] - GIVEN["unembedding"].mean(axis=0))[2]
    assert max(map(highest, starts)) >= max(THEIRS["causal"]["energies_of_vectors"]) * (1 - 1e-4)


# ------------------------------------------------------------------ where v0.0.3 is wrong


def test_rank_correlations_of_v003_are_too_small():
    """It divides a covariance over N by variances over N - 1: even a sample with itself has (N - 1) / N."""
    count = len(GIVEN["ranks_a"])
    assert THEIRS["spearman_of_itself"] == pytest.approx((count - 1) / count)
    assert spearman(GIVEN["ranks_a"], GIVEN["ranks_a"]) == pytest.approx(1)
    assert spearman(GIVEN["ranks_a"], GIVEN["ranks_b"]) == pytest.approx(THEIRS["spearman"] * count / (count - 1), rel=1e-8)


def test_rank_correlations_of_v003_rank_equal_numbers_by_their_place():
    scipy_stats = pytest.importorskip("scipy.stats", reason="scipy comes with scikit-learn")
    expected = scipy_stats.spearmanr(GIVEN["ties"], GIVEN["ranks_b"]).statistic
    assert spearman(GIVEN["ties"], GIVEN["ranks_b"]) == pytest.approx(expected, rel=1e-9)
    count = len(GIVEN["ties"])
    assert abs(THEIRS["spearman_with_ties"] * count / (count - 1) - expected) > 0.01


def test_the_effective_rank_of_a_singular_matrix_in_v003_is_nan():
    assert THEIRS["effective_rank_of_singular"] == "nan"
    p = np.array([3, 2, 1]) / 6
    assert effective_rank(GIVEN["singular"]) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
