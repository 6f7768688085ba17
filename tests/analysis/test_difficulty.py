"""Prediction depth and iteration learned: against their definitions, over checkpoints, and with a planted relation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from metalens import InterpretableModel
from metalens.analysis import (
    Difficulty,
    Question,
    checkpoint_predictions,
    iteration_learned,
    question_predictions,
    score_choices,
    text_depths,
    text_predictions,
)
from metalens.utils.errors import InvalidValueError
from support.mocks import LAYERS, MockModel, WordTokenizer, float64_logits
from support.saved_models import save_zoo_model

FEW = 100  # resamples
TEXTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]


@given(arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.integers(0, 2)))
def test_iteration_learned_is_the_first_step_of_the_final_run(predictions):
    steps = [10 * s * s for s in range(len(predictions))]
    found = iteration_learned(predictions, steps)
    for column, step in zip(predictions.T, found, strict=True):
        s = steps.index(step)
        assert (column[s:] == column[-1]).all()
        assert s == 0 or column[s - 1] != column[-1]


def test_what_is_predicted_from_the_first_step_on_is_learned_there():
    assert iteration_learned(np.array([[1, 0], [1, 2], [1, 2]])).tolist() == [0, 1]
    assert iteration_learned(np.array([[1, 0], [0, 2], [1, 2]]), [5, 7, 100]).tolist() == [100, 7]


@pytest.mark.parametrize("steps", [[0, 1], [0, 2, 1], [0, 1, 1]])
def test_steps_must_rise_and_fit(steps):
    with pytest.raises(InvalidValueError, match="one step for each of the 3 rows"):
        iteration_learned(np.zeros((3, 2)), steps)
    with pytest.raises(InvalidValueError, match="at least"):
        iteration_learned(np.zeros((3, 0)))


def models(*seeds):
    return [InterpretableModel(MockModel(seed=seed), WordTokenizer()) for seed in seeds]


def test_predictions_of_texts_at_every_checkpoint():
    checkpoints = models(0, 1, 2)
    found = checkpoint_predictions(checkpoints, text_predictions(TEXTS))
    expected = [np.concatenate([float64_logits(m.model, np.array(ids))[-1].argmax(-1) for ids in TEXTS]) for m in checkpoints]
    np.testing.assert_array_equal(found, expected)


def test_predictions_of_questions_at_every_checkpoint():
    questions = [Question(f"w{i} w{2 * i}", (" w1", " w2 w3", " w4"), 0) for i in range(6)]
    found = checkpoint_predictions(models(0, 1), question_predictions(questions, "tokens"))
    expected = [score_choices(model, questions).predictions("tokens")[-1] for model in models(0, 1)]
    np.testing.assert_array_equal(found, expected)


def test_checkpoints_are_folders_and_any_source_of_predictions(tmp_path):
    folders = [save_zoo_model(tmp_path / str(seed), "llama", seed=seed) for seed in (1, 2)]
    found = checkpoint_predictions([*folders, folders[0]], text_predictions([[3, 1, 4], [1, 5]]))
    assert found.shape == (3, 5)
    np.testing.assert_array_equal(found[0], found[2])
    assert (found[0] != found[1]).any()
    assert checkpoint_predictions(models(0), lambda model: np.array([model.num_layers])).tolist() == [[LAYERS]]


def test_checkpoints_must_predict_the_same_examples():
    counts = iter([2, 3])
    with pytest.raises(InvalidValueError, match="the same examples"):
        checkpoint_predictions(models(0, 1), lambda _: np.zeros(next(counts)))
    with pytest.raises(InvalidValueError, match="the same examples"):
        checkpoint_predictions([], text_predictions(TEXTS))


def test_depths_of_texts():
    (model,) = models(0)
    depth, groups = text_depths(model, TEXTS)
    assert groups.tolist() == [0] * 5 + [1] * 3 + [2] * 7
    top = np.concatenate([np.stack(float64_logits(model.model, np.array(ids))).argmax(-1) for ids in TEXTS], axis=1)
    assert depth.tolist() == [next(i for i in range(LAYERS) if (column[i:] == column[-1]).all()) for column in top.T]
    some, _ = text_depths(model, TEXTS, layers=[0])
    assert some.tolist() == (top[0] != top[-1]).astype(int).tolist()  # 1 = R: no layer that was read predicts it


def test_a_planted_relation_is_found(rng):
    """Examples that are learned late and settle deep: rank correlation 1; after a shuffle about 0."""
    depth = rng.integers(0, 12, 240)
    groups = np.arange(240) // 4
    related = Difficulty(depth, depth**3, groups).correlation(resamples=FEW)
    assert related.value == pytest.approx(1)
    assert related.low == pytest.approx(1)
    shuffled = Difficulty(depth, rng.permutation(depth), groups).correlation(resamples=FEW)
    assert shuffled.low < 0 < shuffled.high
    assert abs(shuffled.value) < 0.2
    assert Difficulty(depth[:8], -depth[:8], groups[:8]).correlation(resamples=FEW).value == pytest.approx(-1)


def test_the_interval_is_over_texts_and_not_over_their_positions(rng):
    """Positions that repeat one value bring nothing new: the interval stays as wide as that of the texts."""
    depth, learned = rng.normal(size=30), rng.normal(size=30)
    one = Difficulty(depth, learned, np.arange(30)).correlation(resamples=FEW)
    many = Difficulty(np.repeat(depth, 9), np.repeat(learned, 9), np.repeat(np.arange(30), 9)).correlation(resamples=FEW)
    assert many.value == pytest.approx(one.value)
    assert many.high - many.low == pytest.approx(one.high - one.low)


def test_no_correlation_of_equal_examples():
    assert np.isnan(Difficulty(np.zeros(5), np.arange(5), np.arange(5)).correlation().value)
