"""Calibration error and calibrated accuracy against their definitions, and on predictions whose answer is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens.analysis import calibrated_accuracy, calibration_error
from metalens.utils.errors import InvalidValueError


def test_bins_are_equally_full():
    sure = np.array([0.9, 0.1, 0.8, 0.2, 0.7])
    right = np.array([1, 0, 0, 1, 1])
    # sorted: 0.1 0.2 0.7 | 0.8 0.9 with 0 1 1 | 0 1
    expected = 3 / 5 * abs(1 / 3 * 2 - 1.0 / 3) + 2 / 5 * abs(0.5 - 0.85)
    assert calibration_error(sure, right, 2) == pytest.approx(expected)
    squares = 3 / 5 * (2 / 3 - 1 / 3) ** 2 + 2 / 5 * (0.5 - 0.85) ** 2
    assert calibration_error(sure, right, 2, norm=2) == pytest.approx(np.sqrt(squares))
    assert calibration_error(sure, right, 1) == pytest.approx(abs(0.6 - 0.54))


def test_a_calibrated_and_an_overconfident_predictor(rng):
    sure = rng.uniform(0.5, 1.0, 20_000)
    right = rng.uniform(size=sure.size) < sure
    assert calibration_error(sure, right, 10) < 0.02
    assert calibration_error(sure, right) < 0.02
    assert calibration_error(np.full(sure.size, 0.99), right, 10) == pytest.approx(0.99 - right.mean(), abs=1e-9)


def test_the_sweep_stops_where_accuracies_no_longer_rise():
    right = np.array([0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1])
    sure = np.linspace(0.6, 0.7, right.size)  # too sure of the first half, not sure enough of the second
    # two bins: 1/2 and 5/6; three: 1/2, 3/4, 3/4, which does not rise
    assert calibration_error(sure, right) == pytest.approx(calibration_error(sure, right, 2))
    assert calibration_error(sure, right) != pytest.approx(calibration_error(sure, right, 1))


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30), st.integers(1, 3))
def test_the_error_is_a_fraction_and_knows_no_order(pairs, norm):
    sure, right = np.array([p for p, _ in pairs]), np.array([r for _, r in pairs])
    found = calibration_error(sure, right, 1, norm=norm)
    assert 0 <= found <= 1 + 1e-12
    assert calibration_error(sure[::-1], right[::-1], 1, norm=norm) == pytest.approx(found)
    assert found == pytest.approx(abs(sure.mean() - right.mean()))


def test_a_bias_toward_one_answer_is_undone(rng):
    answers = np.arange(100) % 2
    p = 0.9 + 0.05 * answers + 0.01 * rng.uniform(size=100)  # always answer 1, though surer when it is right
    probabilities = np.stack([1 - p, p], axis=1)
    assert np.mean(probabilities.argmax(1) == answers) == 0.5
    assert calibrated_accuracy(probabilities, answers) == 1.0
    assert calibrated_accuracy(probabilities, 1 - answers) == 0.0


def test_three_answers_against_the_definition(rng):
    p = rng.dirichlet([1, 2, 3], size=60)
    answers = rng.integers(0, 3, 60)
    expected = np.mean([p[i, a] > np.quantile(p[:, a], 2 / 3) for i, a in enumerate(answers)])
    assert calibrated_accuracy(p, answers) == pytest.approx(expected)


@pytest.mark.parametrize("choices", [2, 3, 5])
def test_a_predictor_that_knows_nothing_is_at_chance(choices):
    answers = np.arange(30 * choices) % choices
    assert calibrated_accuracy(np.full((answers.size, choices), 1 / choices), answers) == pytest.approx(1 / choices)


def test_arguments():
    with pytest.raises(InvalidValueError, match="one confidence for each"):
        calibration_error(np.zeros(2), np.zeros(3))
    with pytest.raises(InvalidValueError, match="bins must be"):
        calibration_error(np.zeros(2), np.zeros(2), 3)
    with pytest.raises(InvalidValueError, match="C >= 2"):
        calibrated_accuracy(np.zeros((3, 1)), np.zeros(3, int))
