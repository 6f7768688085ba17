"""Sequences longer than the model's context: an error if its positions are a table, one warning otherwise."""

import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gpt2

from metalens import InterpretableModel, evaluate, train
from metalens.models.capture import ContextError
from metalens.models.context import context_in
from support.mocks import MockModel

POSITIONS = 64


@pytest.fixture
def learned():
    """Return a GPT-2 with a table of 64 positions."""
    args = gpt2.ModelArgs(
        model_type="gpt2",
        n_ctx=POSITIONS,
        n_positions=POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=2,
        layer_norm_epsilon=1e-5,
        vocab_size=131,
        num_key_value_heads=2,
    )
    mx.random.seed(0)
    model = gpt2.Model(args)
    mx.eval(model.parameters())
    return InterpretableModel(model)


def ids(rng, tokens):
    return rng.integers(0, 131, tokens).tolist()


def test_learned_positions_are_found(learned, tiny, make_llama):
    assert (learned.source.position_limit, learned.context, learned.default_sequence_length) == (POSITIONS, POSITIONS, POSITIONS)
    assert (tiny.source.position_limit, tiny.context, tiny.default_sequence_length) == (None, None, 512)
    rotary = InterpretableModel(make_llama(context=100))
    assert (rotary.source.position_limit, rotary.context, rotary.default_sequence_length) == (None, 100, 100)


def test_positions_of_a_model_without_a_configuration_and_with_an_offset(rng):
    class Positioned(MockModel):
        def __init__(self):
            super().__init__()
            self.positions = nn.Embedding(22, 32)

        def __call__(self, ids):
            x = self.embed_tokens(ids) + self.positions(2 + mx.arange(ids.shape[1]))
            for layer in self.layers:
                x = layer(x)
            return self.lm_head(self.norm(x))

    model = InterpretableModel(Positioned())
    assert model.source.position_limit == 20
    assert list(model.logit_lens([1] * 20)) == [0, 1, 2]
    with pytest.raises(ContextError, match="context is 20 tokens"):
        model.logit_lens([1] * 21)


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "quantized"])
def test_beyond_the_table_is_an_error_before_the_model_runs(rng, learned, monkeypatch, quantized):
    if quantized:
        nn.quantize(learned.model, group_size=32, bits=8)
    longest, longer = ids(rng, POSITIONS), ids(rng, POSITIONS + 1)
    assert len(learned.read(longest).tokens) == POSITIONS
    message = rf"context is {POSITIONS} tokens: it has no positions for a sequence of {POSITIONS + 1}"
    monkeypatch.setattr(learned.source, "_capture", None)  # no call of the model may be tried
    for call in (learned.read, learned.logit_lens, learned.capture, lambda text: evaluate(learned, text, max_seq_len=POSITIONS + 1)):
        with pytest.raises(ContextError, match=message):
            call(longer)
    with pytest.raises(ContextError, match=message), learned.trace(longer):
        pass
    with pytest.raises(ContextError, match=message):
        train(learned, ids(rng, 1000), recipe="mlxterp", num_steps=1, max_seq_len=POSITIONS + 1)
    with pytest.raises(ContextError, match=message):
        list(learned.source.chunks(mx.array([longer]), 8))


def test_the_defaults_stay_within_the_table(rng, learned):
    text = ids(rng, 10 * POSITIONS)
    losses = []
    lens = learned.train_tuned_lens([text], num_steps=2, verbose=False, callback=lambda _, loss: losses.append(loss))
    assert np.isfinite(losses).all()
    assert len(losses) == 2
    # A tail of one token must not make the sequence before it longer than the table.
    assert evaluate(learned, text[: POSITIONS + 1], lens).tokens == POSITIONS + 1


def test_a_rotary_model_beyond_its_training_length_warns_once(rng, make_llama):
    model = InterpretableModel(make_llama(context=16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.read(ids(rng, 16))
        evaluate(model, ids(rng, 17))
    with pytest.warns(UserWarning, match="17 tokens is longer than the model's context of 16"):
        model.read(ids(rng, 17))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.read(ids(rng, 18))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"n_positions": 1024}, 1024),
        ({"n_ctx": 2048}, 2048),
        ({"max_seq_len": 4096}, 4096),
        ({"model_max_length": 4096}, 4096),
        ({"max_position_embeddings": None}, None),
        ({}, None),
        ({"max_position_embeddings": 100, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}}, 400),
        ({"max_position_embeddings": 800, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 100}}, 800),
        ({"max_position_embeddings": 100, "rope_scaling": {"type": "linear", "factor": 2.0}}, 100),
    ],
)
def test_the_context_under_every_name(config, expected):
    assert context_in(config) == expected
