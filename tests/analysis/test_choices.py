"""Scores of choices at every layer against float64 NumPy, and models whose answer is known."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metalens import InterpretableModel
from metalens.analysis import Question, accuracy_by_layer, overthinking, score_choices, score_continuations
from metalens.analysis.choices import Continuation, continuation_of
from metalens.utils.errors import InvalidValueError
from support import oracle
from support.mocks import LAYERS, MockModel, WordTokenizer, float64_logits, random_lens

QUESTIONS = [
    Question("w3 w1 w4", (" w9", " w17", " w4"), 1),  # one token each: one forward pass
    Question("w5", (" w9 w2", " w8", " w9 w2 w6"), 0),
    Question("w7 w7", (" w1", " w2"), 0),
]


@pytest.fixture
def model():
    return InterpretableModel(MockModel(), WordTokenizer())


def expected_scores(model, question):
    """Return the log-probabilities [L, C] and whether the choices are greedy, by one forward pass for each choice."""
    log_probs, greedy = [], []
    for choice in question.choices:
        context, ids = (model.encode(text) for text in (question.context, choice))
        z = np.stack(float64_logits(model.model, np.array(context + ids)))[:, len(context) - 1 : -1]
        log_q = oracle.log_softmax(z)
        log_probs.append(np.take_along_axis(log_q, np.array(ids)[None, :, None], axis=-1).sum((1, 2)))
        greedy.append((z.argmax(-1) == ids).all(-1))
    return np.stack(log_probs, 1), np.stack(greedy, 1)


def test_scores_equal_float64_at_every_layer(model):
    found = score_choices(model, QUESTIONS)
    assert found.layers == tuple(range(LAYERS))
    assert found.answers.tolist() == [1, 0, 0]
    assert found.tokens.tolist() == [[1, 1, 1], [2, 1, 3], [1, 1, 0]]
    assert found.characters.tolist() == [[3, 4, 3], [6, 3, 9], [3, 3, 0]]
    for i, question in enumerate(QUESTIONS):
        log_probs, greedy = expected_scores(model, question)
        count = len(question.choices)
        np.testing.assert_allclose(found.log_probs[:-1, i, :count], log_probs, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.log_probs[-1, i, :count], log_probs[-1], rtol=1e-5, atol=1e-5)  # the last layer is the model
        np.testing.assert_array_equal(found.greedy[:-1, i, :count], greedy)
    assert np.isnan(found.log_probs[:, 2, 2]).all()


def test_a_lens_changes_the_layers_and_not_the_model(model):
    lens = random_lens()
    plain, tuned = score_choices(model, QUESTIONS), score_choices(model, QUESTIONS, lens, layers=[2, 0])
    assert tuned.layers == (2, 0)
    np.testing.assert_allclose(tuned.log_probs[-1], plain.log_probs[-1], rtol=1e-5)
    own = model.trajectory("w7 w7", lens, layers=[2, 0], position=-1, tokens=["w1", "w2"])
    np.testing.assert_allclose(tuned.log_probs[:-1, 2, :2], own.chosen_log_probs[:, :, 0].T, rtol=1e-5)


def test_choices_that_share_their_context_take_one_forward_pass(model, monkeypatch):
    calls = []
    capture = type(model.source).capture
    monkeypatch.setattr(type(model.source), "capture", lambda self, ids, *a, **k: calls.append(ids.shape) or capture(self, ids, *a, **k))
    _ = model.unembed
    calls.clear()
    score_choices(model, QUESTIONS)
    # the three words of question 0 once; of question 1 'w5 w9', 'w5' and 'w5 w9 w2'; 'w7 w7' once: last tokens are never read
    assert sorted(calls) == [(1, 1), (1, 2), (1, 2), (1, 3), (1, 3)]


def test_probabilities_and_lengths(model):
    found = score_choices(model, QUESTIONS)
    for normalize, lengths in {"none": np.ones((3, 3)), "tokens": found.tokens, "characters": found.characters}.items():
        p = found.probabilities(normalize)
        np.testing.assert_allclose(p.sum(-1), 1)
        assert (p[:, 2, 2] == 0).all()
        scores = found.log_probs[:, 1] / lengths[1]
        np.testing.assert_allclose(p[:, 1], np.exp(oracle.log_softmax(scores)))
        np.testing.assert_array_equal(found.predictions(normalize)[:, 1], scores.argmax(-1))
    with pytest.raises(InvalidValueError, match="normalize must be"):
        found.probabilities("words")


def test_clozes_are_right_if_every_token_is_on_top(model):
    z = float64_logits(model.model, np.array([3, 1, 4]))
    first = int(z[-1][-1].argmax())
    second = int(float64_logits(model.model, np.array([3, 1, 4, first]))[-1][-1].argmax())
    right = Question("w3 w1 w4", (f" w{first} w{second}",), 0)
    wrong = Question("w3 w1 w4", (f" w{first} w{(second + 1) % 100}",), 0)
    found = score_choices(model, [right, wrong])
    assert found.is_cloze
    assert found.correct()[-1].tolist() == [True, False]
    (*_, own) = accuracy_by_layer(found)
    assert (own.layer, own.accuracy.value, own.calibrated_accuracy, own.calibration_error) == (None, 0.5, None, None)
    with pytest.raises(InvalidValueError, match="no choices"):
        found.predictions()


def silent_after(block):
    """Return a model whose blocks after `block` add nothing, so that the answer is there already."""
    model = MockModel()
    for later in model.layers[block + 1 :]:
        later.down.weight = mx.zeros_like(later.down.weight)
    return InterpretableModel(model, WordTokenizer())


@pytest.mark.parametrize("block", range(LAYERS))
def test_a_model_that_has_the_answer_at_a_layer_has_that_depth(block, rng):
    questions = [Question(f"w{a} w{b}", (" w1", " w2", " w3", " w4"), 0) for a, b in rng.integers(0, 100, (12, 2))]
    model = silent_after(block)
    found = score_choices(model, questions)
    depth = found.prediction_depth()
    predicted = np.stack([expected_scores(model, question)[0].argmax(1) for question in questions], 1)
    assert depth.max() == block or block == 0  # some answer still changes in this block, and none in a later one
    assert depth.tolist() == [next(i for i in range(LAYERS) if (column[i:] == column[-1]).all()) for column in predicted.T]
    by_layer = accuracy_by_layer(found)
    assert {each.accuracy.value for each in by_layer[block:]} == {by_layer[-1].accuracy.value}


def test_accuracy_and_calibration_by_layer(model):
    questions = [Question(f"w{i} w{3 * i}", (" w1", " w2"), i % 2) for i in range(8)]
    found = score_choices(model, questions)
    for row, each in enumerate(accuracy_by_layer(found, bins=2)):
        right = found.predictions()[row] == found.answers
        assert each.accuracy.value == right.mean()
        assert each.accuracy.low <= right.mean() <= each.accuracy.high
        assert each.right_probability == pytest.approx(found.probabilities()[row][np.arange(8), found.answers].mean())
        assert 0 <= each.calibration_error <= 1
        assert each.calibrated_accuracy is not None


def test_features_are_trajectories_of_the_choices(model):
    two = [Question("w3", (" w1", " w2"), 0), Question("w4", (" w1", " w2"), 0)]
    found = score_choices(model, two)
    np.testing.assert_allclose(found.features()[:, :, 0], (found.log_probs[..., 1] - found.log_probs[..., 0]).T)
    assert score_choices(model, QUESTIONS[:2]).features().shape == (2, LAYERS + 1, 3)
    with pytest.raises(InvalidValueError, match="different numbers of choices"):
        score_choices(model, QUESTIONS).features()


class CopyModel(MockModel):
    """A model that predicts the token after the last earlier place of the current one, from block 1 on; block 0 says the true answer.

    Tokens 10 to 19 are questions; question q has the true answer 30 + q % 2.
    """

    def __call__(self, ids):
        x = self.embed_tokens(ids)
        rows = np.array(ids)
        truth, copied = np.zeros((*rows.shape, 100), np.float32), np.zeros((*rows.shape, 100), np.float32)
        for b, row in enumerate(rows):
            for t, token in enumerate(row):
                truth[b, t, 30 + int(token) % 2] = 5.0
                seen = [row[s + 1] for s in range(t) if row[s] % 2 == token % 2 and 30 <= row[s + 1] < 32]
                if seen:
                    copied[b, t, int(seen[-1])] = 9.0
        self.layers[0].writes, self.layers[1].writes = mx.array(truth), mx.array(copied)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def test_false_demonstrations_make_a_copying_model_overthink():
    """A model whose first block knows the answer and whose second copies demonstrations: the paper's overthinking, planted."""

    class Writes(nn.Module):
        def __call__(self, x):
            return x + self.writes

    network = CopyModel(vocab=100, dim=100, layers=2, block=lambda dim: Writes())
    network.embed_tokens.weight = mx.zeros((100, 100))
    network.lm_head.weight, network.lm_head.bias = mx.eye(100), mx.zeros((100,))
    network.norm.weight = mx.ones((100,))
    model = InterpretableModel(network, WordTokenizer())
    questions = [Question(f"w{10 + i}", (" w30", " w31"), i % 2) for i in range(10)]
    found = overthinking(model, questions, shots=9, separator=" ")
    assert found.true.correct().all()
    assert found.false.correct()[0].all()  # block 0 is not misled
    assert not found.false.correct()[1:].any()  # block 1, and with it the model, is
    assert [gap.value for gap in found.gap()] == [0.0, 1.0, 1.0]
    layer, gain = found.best_layer()
    assert (layer, gain.value) == (0, 1.0)


def test_the_convention_of_the_harness(model):
    assert continuation_of(model, "w1 w2", " w3 w4") == Continuation((1, 2), (3, 4))
    assert continuation_of(model, "w1 w2 ", "w3") == Continuation((1, 2), (3,))  # the space goes to the continuation
    with pytest.raises(InvalidValueError, match="at least one token"):
        continuation_of(model, "", "w3")
    with pytest.raises(InvalidValueError, match="at least one token"):
        continuation_of(model, "w1", "  ")


def test_bad_input(model):
    with pytest.raises(InvalidValueError, match="no question"):
        score_choices(model, [])
    with pytest.raises(InvalidValueError, match="no layer 3"):
        score_choices(model, QUESTIONS, layers=[3])
    with pytest.raises(InvalidValueError, match="outside the model's vocabulary"):
        score_continuations(model, [Continuation((1, 2), (100,))])
    model.model.norm.weight = mx.full(model.model.norm.weight.shape, np.nan)
    with pytest.raises((InvalidValueError, AttributeError), match="NaN"):
        score_choices(model, QUESTIONS)
