"""Captures that go on from a cache, that stop after a block, and that keep the embedding's output."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import mamba

from metalens.models.capture import ResidualCapture, ResidualStreamError
from support.mocks import DIM, Block, MockModel, tiny_llama

IDS = mx.array([[3, 1, 4, 1, 5, 9]])


def same(a, b):
    np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-5)


class KeywordModel(MockModel):
    """Gives its blocks their input by name."""

    def __call__(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x=x)
        return self.lm_head(self.norm(x))


class First(Block):
    """A block that holds the embedding itself."""

    def __call__(self, ids):
        return super().__call__(self.embed(ids))


class IdsIntoBlock0(MockModel):
    """Gives its first block token ids, no residual stream."""

    def __init__(self):
        super().__init__()
        self.layers[0] = First(DIM)
        self.layers[0].embed = self.embed_tokens

    def __call__(self, ids):
        for layer in self.layers:
            ids = layer(ids)
        return self.lm_head(self.norm(ids))


@pytest.mark.parametrize("model", [MockModel(), KeywordModel(), tiny_llama()], ids=["mock", "keyword", "llama"])
def test_the_embedding_is_the_input_of_block_0(model):
    embed = model.model.embed_tokens if hasattr(model, "model") else model.embed_tokens
    source = ResidualCapture(model)
    same(source.capture(IDS, with_embedding=True).embedding, embed(IDS))
    assert source.capture(IDS).embedding is None
    part = source.capture(mx.concatenate([IDS, IDS]), with_embedding=True).of_sequences(slice(1, 2))
    same(part.embedding, embed(IDS))


def test_an_input_that_is_no_residual_stream():
    source = ResidualCapture(IdsIntoBlock0())
    assert len(source.capture(IDS).hidden) == 3
    with pytest.raises(ResidualStreamError, match="embedding of this model can't be read"):
        source.capture(IDS, with_embedding=True)


def test_captures_from_a_cache_equal_one_pass():
    source = ResidualCapture(tiny_llama(layers=3))
    whole, cache = source.capture(IDS, with_embedding=True), source.new_cache()
    start = 0
    for length in (3, 1, 2):
        part = source.capture_next(IDS[:, start : start + length], cache, with_embedding=True)
        for ours, theirs in zip([part.embedding, *part.hidden], [whole.embedding, *whole.hidden], strict=True):
            same(ours, theirs[:, start : start + length])
        same(part.logits, whole.logits[:, start : start + length])
        start += length


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_pass_that_stops_after_a_block(last):
    model = tiny_llama(layers=3)
    source = ResidualCapture(model)
    whole, cache = source.capture(IDS), source.new_cache()
    classes = [type(layer) for layer in source.layers]
    found = [source.capture_next(ids, cache, last_block=last) for ids in (IDS[:, :4], IDS[:, 4:])]
    assert [len(states.hidden) for states in found] == [last + 1] * 2
    assert found[0].logits.shape == (1, 4, 0)
    for layer in range(last + 1):
        same(mx.concatenate([states.hidden[layer] for states in found], axis=1), whole.hidden[layer])
    assert [entry.empty() for entry in cache] == [i > last for i in range(3)]
    assert [type(layer) for layer in source.layers] == classes


def test_which_models_take_a_cache():
    args = mamba.ModelArgs(
        model_type="mamba", vocab_size=50, hidden_size=16, intermediate_size=32, state_size=4, num_hidden_layers=2, conv_kernel=3, use_bias=False,
        use_conv_bias=True, time_step_rank=2,
    )  # fmt: skip
    assert ResidualCapture(tiny_llama()).takes_cache
    assert ResidualCapture(mamba.Model(args)).takes_cache
    assert not ResidualCapture(MockModel()).takes_cache
