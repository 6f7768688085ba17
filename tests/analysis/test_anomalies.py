"""Features of trajectories, detectors, and AUROC: against definitions, and with a planted anomaly and none."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens import InterpretableModel
from metalens.analysis import (
    DETECTORS,
    auroc,
    bootstrap_auroc,
    detect_anomalies,
    fit_detector,
    hidden_features,
    read_prompts,
    trajectory_features,
)
from metalens.utils.errors import InvalidValueError, MissingPackageError
from support.mocks import DIM, LAYERS, MockModel, WordTokenizer, float64_logits, random_lens

HAS_SKLEARN = importlib.util.find_spec("sklearn") is not None
needs_sklearn = pytest.mark.skipif(not HAS_SKLEARN, reason="scikit-learn is not installed")
METHODS = [pytest.param(name, marks=() if name == "relative-mahalanobis" else needs_sklearn) for name in DETECTORS]

scores = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@given(scores, scores)
def test_auroc_counts_pairs(negative, positive):
    a, b = np.array(negative, float), np.array(positive, float)
    expected = np.mean((b[:, None] > a) + 0.5 * (b[:, None] == a))
    assert auroc(a, b) == pytest.approx(expected)
    assert auroc(b, a) == pytest.approx(1 - expected)


def test_auroc_of_nothing_is_not_a_number():
    assert np.isnan(auroc(np.zeros(0), np.ones(3)))
    found = bootstrap_auroc(np.array([0.0]), np.array([1.0]))  # half of the resamples have one group alone
    assert (found.value, found.low, found.high) == (1, 1, 1)


@pytest.fixture
def model():
    return InterpretableModel(MockModel(), WordTokenizer())


def test_features_are_statistics_of_every_layer(model):
    found = [model.trajectory(text, random_lens(), tokens=[7]) for text in ("w1 w2 w3", "w4 w5", "w6 w7 w8 w9")]
    features = trajectory_features(found, ["kl", "entropy"])
    assert features.shape == (3, LAYERS, 3)
    for row, t in zip(features, found, strict=True):
        np.testing.assert_allclose(row, np.stack([t.kl[:, -1], t.entropy[:, -1], t.chosen_log_probs[0, :, -1]], -1), rtol=1e-6)
    z = np.stack(float64_logits(model.model, np.array([4, 5])))[:, -1]
    p = np.exp(z - z.max(-1, keepdims=True))
    (own,) = trajectory_features([model.trajectory([4, 5])], ["max_probability"], -1)
    np.testing.assert_allclose(own[:, 0], (p / p.sum(-1, keepdims=True)).max(-1), rtol=1e-5)
    assert trajectory_features(found, ["cross_entropy"], -2).shape == (3, LAYERS, 2)


def test_features_that_do_not_exist(model):
    t = model.trajectory([1, 2, 3], compare=False)
    with pytest.raises(InvalidValueError, match="no statistic 'kl'"):
        trajectory_features([t], ["kl"])
    with pytest.raises(InvalidValueError, match="no next token"):
        trajectory_features([t], ["cross_entropy"])
    with pytest.raises(InvalidValueError, match="the same layers"):
        trajectory_features([t, model.trajectory([1, 2], layers=[0])])
    with pytest.raises(InvalidValueError, match="no trajectory"):
        trajectory_features([])


def test_hidden_features(model):
    found = hidden_features(model, [[1, 2, 3], [4]], -1)
    expected = [np.array(model.source.capture(model.ids(ids)).hidden[-1][0, -1]) for ids in ([1, 2, 3], [4])]
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(hidden_features(model, [[1, 2]]), hidden_features(model, [[1, 2]], LAYERS // 2))
    assert found.shape == (2, DIM)
    with pytest.raises(InvalidValueError, match="layer"):
        hidden_features(model, [[1]], 3)
    with pytest.raises(InvalidValueError, match="no position"):
        hidden_features(model, [[1]], 0, position=1)


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_anomaly_is_found_and_none_is_not(method, rng):
    mix = rng.normal(size=(6, 6))  # correlated features, as those of neighboring layers are
    normal = (rng.normal(size=(120, 6)) @ mix).reshape(120, 3, 2)
    shifted = (rng.normal(size=(30, 6)) @ mix).reshape(30, 3, 2) + 40
    found = detect_anomalies(normal, shifted, method, resamples=100)
    assert found.auroc.value == 1
    assert found.auroc.low == 1
    assert (found.fitted, len(found.normal), len(found.anomalous)) == (90, 30, 30)
    nothing = detect_anomalies(normal, (rng.normal(size=(30, 6)) @ mix).reshape(30, 3, 2), method, resamples=100)
    assert abs(nothing.auroc.value - 0.5) < 0.2
    assert nothing.auroc.low < 0.5 < nothing.auroc.high


@pytest.mark.parametrize("method", METHODS)
def test_the_detector_sees_the_fitted_examples_alone(method, rng):
    """The scores of an example depend on no example that was held out, and not on the anomalous ones."""
    normal, anomalous = rng.normal(size=(40, 5)), rng.normal(size=(9, 5)) + 3
    first, second = (detect_anomalies(normal, part, method, seed=3, resamples=10) for part in (anomalous, anomalous[:4]))
    np.testing.assert_allclose(first.anomalous[:4], second.anomalous)
    np.testing.assert_allclose(first.normal, second.normal)
    order = np.random.default_rng(3).permutation(40)
    changed = normal.copy()
    changed[order[0]] += 100  # held out
    third = detect_anomalies(changed, anomalous, method, seed=3, resamples=10)
    np.testing.assert_allclose(third.anomalous, first.anomalous)
    np.testing.assert_allclose(third.normal[1:], first.normal[1:])


def test_relative_mahalanobis_equals_its_definition(rng):
    rows, x = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4)), rng.normal(size=(7, 4))
    covariance = np.cov(rows.T) + 1e-3 * np.eye(4)
    d = x - rows.mean(0)
    expected = [v @ np.linalg.solve(covariance, v) - (v**2 / np.diag(covariance)).sum() for v in d]
    np.testing.assert_allclose(fit_detector(rows, "relative-mahalanobis").scores(x), expected)


@needs_sklearn
def test_mahalanobis_is_a_distance_in_units_of_each_feature(rng):
    rows = rng.normal(size=(400, 3)) * [1, 1000, 0.001]
    found = fit_detector(rows, "mahalanobis").scores(rows.mean(0) + np.diag([3, 3000, 0.003]))
    np.testing.assert_allclose(found, 9, rtol=0.3)


def test_the_curve_goes_from_nothing_to_all(rng):
    found = detect_anomalies(rng.normal(size=(40, 3)), rng.normal(size=(20, 3)) + 1, "relative-mahalanobis")
    false, true = found.curve()
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert (np.diff(false) >= 0).all()
    assert np.trapezoid(true, false) == pytest.approx(found.auroc.value)


def test_bad_input(rng):
    normal = rng.normal(size=(8, 3))
    with pytest.raises(InvalidValueError, match="no detector 'svm'"):
        fit_detector(normal, "svm")
    with pytest.raises(InvalidValueError, match="3 and 4 features"):
        detect_anomalies(normal, np.zeros((2, 4)), "relative-mahalanobis")
    with pytest.raises(InvalidValueError, match="can't be divided"):
        detect_anomalies(normal, normal, "relative-mahalanobis", held_out=0.9)
    with pytest.raises(InvalidValueError, match="finite numbers"):
        detect_anomalies(normal, np.full((2, 3), np.nan), "relative-mahalanobis")
    with pytest.raises(InvalidValueError, match="two normal examples"):
        fit_detector(normal[:1], "relative-mahalanobis")


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch, rng):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.covariance", None)
    with pytest.raises(MissingPackageError, match=r"metalens\[analysis\]"):
        fit_detector(rng.normal(size=(8, 3)), "isolation-forest")


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a b"}\n{"context": "c", "answer": "d"}\n', encoding="utf-8")
    assert read_prompts(path) == ["a b", "c"]
    path.write_text('{"text": "a b"}\n{"prompt": "c"}\n', encoding="utf-8")
    with pytest.raises(InvalidValueError, match="line 2: there is no field 'text'"):
        read_prompts(path)
