"""Rank correlation and bootstrap intervals, against definitions and known distributions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens.analysis.resampling import bootstrap, bootstrap_mean, ranks, spearman

NUMBERS = st.lists(st.integers(-3, 3), min_size=2, max_size=12)


@given(NUMBERS)
def test_ranks_are_means_over_equal_numbers(x):
    expected = [np.mean([1 + sum(b < a for b in x), sum(b <= a for b in x)]) for a in x]
    np.testing.assert_allclose(ranks(x), expected)


@given(NUMBERS, st.data())
def test_spearman_is_the_correlation_of_ranks(x, data):
    y = data.draw(st.lists(st.integers(-3, 3), min_size=len(x), max_size=len(x)))
    if len(set(x)) < 2 or len(set(y)) < 2:
        assert math.isnan(spearman(x, y))
        return
    assert spearman(x, y) == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1], abs=1e-12)
    assert spearman(x, y) == pytest.approx(spearman(np.exp(x), y), abs=1e-12)  # only the order counts
    assert spearman(x, [-b for b in y]) == pytest.approx(-spearman(x, y), abs=1e-12)


def test_known_correlations():
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # The textbook's 1 - 6 sum d^2 / (n (n^2 - 1)), which holds without ties.
    assert spearman([106, 86, 100, 101, 99, 103, 97, 113, 112, 110], [7, 0, 27, 50, 28, 29, 20, 12, 6, 17]) == pytest.approx(-29 / 165)


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2, 3]), ([1, math.nan], [1, 2])])
def test_samples_that_have_no_correlation(x, y):
    with pytest.raises(ValueError, match="one length without NaN"):
        spearman(x, y)


def test_the_interval_of_a_mean_is_that_of_the_central_limit():
    x = np.random.default_rng(1).normal(3, 2, 400)
    found = bootstrap_mean(x, resamples=4000, seed=5)
    error = x.std(ddof=1) / math.sqrt(x.size)
    assert found.value == pytest.approx(x.mean())
    assert found.low == pytest.approx(x.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(x.mean() + 1.96 * error, abs=0.15 * error)
    assert bootstrap_mean(x, resamples=4000, level=0.5, seed=5).high == pytest.approx(x.mean() + 0.6745 * error, abs=0.1 * error)


def test_weights_of_a_mean():
    assert bootstrap_mean([1.0, 4.0], [1, 3]).value == pytest.approx(13 / 4)
    assert bootstrap_mean([1.0, 4.0], [1, 3]).low == pytest.approx(1.0)


def test_draws_are_repeatable_and_leave_the_global_state_alone():
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    x = [1.0, 2.0, 5.0, 9.0]
    assert bootstrap_mean(x, seed=1) == bootstrap_mean(x, seed=1)
    assert bootstrap_mean(x, resamples=50, seed=1) != bootstrap_mean(x, resamples=50, seed=2)
    assert np.random.get_state()[1].tolist() == before


def test_one_sample_has_no_interval():
    value, low, high = bootstrap_mean([2.0])
    assert value == 2.0
    assert math.isnan(low)
    assert math.isnan(high)


def test_resamples_without_a_value_are_left_out():
    x, y = np.array([0.0, 1.0]), np.array([5.0, 7.0])
    assert bootstrap(lambda chosen: spearman(x[chosen], y[chosen]), 2) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("arguments", [{"size": 0}, {"size": 2, "resamples": 0}, {"size": 2, "level": 1.0}])
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match="A bootstrap needs"):
        bootstrap(lambda chosen: 0.0, **arguments)
