"""get_token_predictions: the best tokens of hidden states, by the model's head or another one."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metalens import InterpretableModel
from support.mocks import DIM, VOCAB, MockModel, WordTokenizer

TEXT = "w3 w1 w4 w1 w5"
IDS = [3, 1, 4, 1, 5]


@pytest.fixture
def model():
    return InterpretableModel(MockModel(), WordTokenizer())


def best(logits, k):
    ids = np.argsort(-np.array(logits), kind="stable")[:k]
    return [(int(i), float(np.array(logits)[i])) for i in ids]


def assert_pairs(found, expected):
    assert [i for i, _ in found] == [i for i, _ in expected]
    assert all(type(i) is int and type(z) is float for i, z in found)
    np.testing.assert_allclose([z for _, z in found], [z for _, z in expected], rtol=1e-4, atol=1e-4)


def test_predictions_of_one_state(model):
    state = model.model.norm(model.capture(TEXT).hidden[1])[0, -1]
    expected = best(model.model.lm_head(state), 10)
    assert model.get_token_predictions(state) == [i for i, _ in expected]
    assert model.get_token_predictions(state, top_k=1) == [expected[0][0]]
    assert_pairs(model.get_token_predictions(state, return_scores=True), expected)


def test_predictions_of_several_states(model):
    states = model.model.norm(model.capture(TEXT).hidden[1])[0]
    found = model.get_token_predictions(states, top_k=4, return_scores=True)
    assert len(found) == len(IDS)
    for row, state in zip(found, states, strict=True):
        assert_pairs(row, best(model.model.lm_head(state), 4))
    assert model.get_token_predictions(states, top_k=4) == [[i for i, _ in row] for row in found]


@pytest.mark.parametrize("shape", [(), (1, 5, DIM)])
def test_states_of_other_dimensions(model, shape):
    with pytest.raises(ValueError, match=r"hidden_state must be \[D\] or \[N, D\]"):
        model.get_token_predictions(mx.zeros(shape))


def test_states_of_another_width(model):
    with pytest.raises(ValueError, match=rf"{DIM}"):
        model.get_token_predictions(mx.zeros((DIM + 1,)))


@pytest.mark.parametrize("top_k", [0, -1, VOCAB + 1])
@pytest.mark.parametrize("head", [None, "lm_head"])
def test_top_k_of_states_out_of_range(model, top_k, head):
    with pytest.raises(ValueError, match=rf"top_k must be from 1 to {VOCAB} \(the vocabulary\), not {top_k}"):
        model.get_token_predictions(mx.zeros((DIM,)), top_k=top_k, lm_head=None if head is None else model.model.lm_head)


def test_another_head(model):
    state = mx.array(np.random.default_rng(0).normal(size=DIM).astype(np.float32))
    head = nn.Linear(DIM, 7)
    assert_pairs(model.get_token_predictions(state, 3, True, lm_head=head), best(head(state), 3))
    assert model.get_token_predictions(state[None], 7, lm_head=head) == [[i for i, _ in best(head(state), 7)]]
    assert_pairs(model.get_token_predictions(state, 3, True, lm_head=lambda h: -head(h)), best(-head(state), 3))


@pytest.mark.parametrize("quantized", [False, True])
def test_another_embedding(model, quantized):
    embedding = nn.Embedding(9, DIM)
    embedding = embedding.to_quantized(group_size=32, bits=8) if quantized else embedding
    state = mx.array(np.random.default_rng(0).normal(size=DIM).astype(np.float32))
    assert_pairs(model.get_token_predictions(state, 5, True, embedding_layer=embedding), best(embedding.as_linear(state[None])[0], 5))
    other = nn.Linear(DIM, 7)
    assert_pairs(model.get_token_predictions(state, 5, True, embedding_layer=embedding, lm_head=other), best(other(state), 5))


def test_an_embedding_of_another_kind(model):
    with pytest.raises(TypeError, match="embedding_layer must be an mlx.nn embedding or linear layer"):
        model.get_token_predictions(mx.zeros((DIM,)), embedding_layer="embed_tokens")
