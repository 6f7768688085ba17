"""Distances of Gaussians: against closed forms, other formulas in float64, and planted distributions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens.analysis import (
    GaussianDistances,
    ResidualStatistics,
    gaussian_bhattacharyya,
    gaussian_kl,
    gaussian_wasserstein,
    gaussian_wasserstein_to_origin,
    residual_report,
)


def statistics(mean, covariance, count=1000):
    """Statistics with exactly this mean and covariance."""
    found = ResidualStatistics(len(mean))
    found.mean, found.count, found._scatter = np.array(mean, float), count, np.array(covariance, float) * (count - 1)
    return found


def random_pair(seed, width=5):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(2):
        factor = rng.normal(size=(width, width))
        made.append(statistics(rng.normal(size=width), factor @ factor.T + 0.05 * np.eye(width)))
    return made


def root(c):
    values, vectors = np.linalg.eigh(c)
    return vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T


@given(st.integers(0, 10_000))
def test_against_the_textbook_formulas(seed):
    a, b = random_pair(seed)
    ca, cb, d = a.covariance, b.covariance, a.mean - b.mean
    middle = root(root(ca) @ cb @ root(ca))
    assert gaussian_wasserstein(a, b) ** 2 == pytest.approx(d @ d + np.trace(ca + cb - 2 * middle), rel=1e-8, abs=1e-9)
    inverse = np.linalg.inv(cb)
    kl = (np.trace(inverse @ ca) + d @ inverse @ d - 5 + math.log(np.linalg.det(cb) / np.linalg.det(ca))) / 2
    assert gaussian_kl(a, b) == pytest.approx(kl, rel=1e-7, abs=1e-9)
    c = (ca + cb) / 2
    distance = d @ np.linalg.inv(c) @ d / 8 + math.log(np.linalg.det(c) / math.sqrt(np.linalg.det(ca) * np.linalg.det(cb))) / 2
    assert gaussian_bhattacharyya(a, b) == pytest.approx(distance, rel=1e-7, abs=1e-9)
    assert gaussian_wasserstein(b, a) == pytest.approx(gaussian_wasserstein(a, b))
    assert gaussian_bhattacharyya(b, a) == pytest.approx(gaussian_bhattacharyya(a, b))
    assert min(gaussian_kl(a, b), gaussian_bhattacharyya(a, b)) >= 0


def test_one_dimension_by_numerical_integration():
    a, b = statistics([0.3], [[0.5]]), statistics([-0.2], [[1.7]])
    x = np.linspace(-30, 30, 400_001)
    p, q = (np.exp(-((x - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v) for m, v in ((0.3, 0.5), (-0.2, 1.7)))
    assert gaussian_kl(a, b) == pytest.approx((p * np.log(np.maximum(p, 1e-300) / np.maximum(q, 1e-300))).sum() * (x[1] - x[0]), rel=1e-6)
    assert gaussian_bhattacharyya(a, b) == pytest.approx(-math.log(np.sqrt(p * q).sum() * (x[1] - x[0])), rel=1e-6)
    assert gaussian_wasserstein(a, b) == pytest.approx(math.hypot(0.5, math.sqrt(1.7) - math.sqrt(0.5)))


def test_planted_distributions(rng):
    """A shift moves the Wasserstein distance by its length, a scale by the difference of the standard deviations."""
    x = rng.standard_normal((4000, 6)) @ rng.normal(size=(6, 6))
    a, moved, twice = ResidualStatistics(6), ResidualStatistics(6), ResidualStatistics(6)
    a.add(x)
    moved.add(x + np.array([3, 0, 4, 0, 0, 0]))
    twice.add(2 * x)
    assert gaussian_wasserstein(a, moved) == pytest.approx(5, rel=1e-6)
    assert gaussian_wasserstein(a, twice) == pytest.approx(gaussian_wasserstein_to_origin(a), rel=1e-9)
    assert gaussian_wasserstein_to_origin(a) == pytest.approx(math.sqrt((x**2).sum(axis=1).mean()), rel=1e-3)
    assert gaussian_kl(a, twice) == pytest.approx(6 * (0.25 - 1 + math.log(4)) / 2 + gaussian_kl(statistics(a.mean / 2, a.covariance), a), abs=1e-6)
    assert gaussian_kl(a, a) == gaussian_bhattacharyya(a, a) == pytest.approx(0, abs=1e-12)
    assert gaussian_wasserstein(a, a) == pytest.approx(0, abs=1e-5)


def test_a_singular_covariance_has_a_wasserstein_distance_only(rng):
    a, b = ResidualStatistics(6), ResidualStatistics(6)
    a.add(rng.standard_normal((4, 6)))
    b.add(rng.standard_normal((9, 6)))
    assert gaussian_wasserstein(a, b) > 0
    for measure in (gaussian_kl, gaussian_bhattacharyya):
        with pytest.raises(ValueError, match="4 positions in 6 dimensions is singular"):
            measure(a, b)
    found = GaussianDistances.of(a, b)
    assert (found.kl, found.bhattacharyya, found.wasserstein) == (None, None, gaussian_wasserstein(a, b))
    flat = statistics(np.zeros(3), np.diag([1, 1, 0]))
    with pytest.raises(ValueError, match="singular"):
        gaussian_kl(flat, flat)
    with pytest.raises(ValueError, match="width 6 and 3"):
        gaussian_wasserstein(a, flat)


def test_they_are_in_the_report(rng):
    found = {layer: ResidualStatistics(3) for layer in ("embedding", 0, 1)}
    for each in found.values():
        each.add(rng.standard_normal((20, 3)))
    report = residual_report(found, distances=True)
    assert [each is None for each in (layer.to_next for layer in report.layers)] == [False, False, True]
    assert report.layers[1].to_next == GaussianDistances.of(found[0], found[1])
    assert all(layer.to_next is None for layer in residual_report(found).layers)
