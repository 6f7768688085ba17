"""Blocks that change places, and edits that need a block's input: against the blocks called by hand."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metalens import InterpretableModel
from metalens.models.capture import BlockEdit, ResidualCapture, ResidualStreamError
from metalens.models.rewiring import edited_input, reordered_blocks
from support.mocks import DIM, Block, MockModel, tiny_llama

IDS = mx.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


class Squashing(Block):
    """A block of another class, which returns a tuple."""

    def __call__(self, x):
        return mx.tanh(super().__call__(x)), "state"


class Mixed(MockModel):
    """A model whose blocks are of two classes."""

    def __init__(self):
        super().__init__()
        self.layers[1] = Squashing(self.layers[0].down.weight.shape[0])

    def __call__(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.lm_head(self.norm(x))


def by_hand(model, order):
    """Return the hidden states of a model whose blocks run in this order."""
    x, hidden = model.embed_tokens(IDS), []
    for index in order:
        x = model.layers[index](x)
        x = x[0] if isinstance(x, tuple) else x
        hidden.append(x)
    return hidden


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [2, 1, 0], [1, 2, 0], [1, 1, 1], [0, 0, 2]])
def test_orders_against_the_blocks_by_hand(order):
    model = Mixed()
    source = ResidualCapture(model)
    classes = [type(layer) for layer in model.layers]
    with reordered_blocks(source.layers, order):
        found = source.capture(IDS)
    for ours, expected in zip(found.hidden, by_hand(model, order), strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(expected), rtol=1e-6, atol=1e-6)
    assert [type(layer) for layer in model.layers] == classes


def test_accelerated_blocks_change_places_too():
    model = InterpretableModel(tiny_llama(layers=3), accelerate=True)
    mx.eval(model.model.parameters())
    with reordered_blocks(model.source.layers, [2, 0, 1]):
        found = model.source.capture(IDS).hidden[-1]
    model.model.model.layers = [model.model.model.layers[i] for i in (2, 0, 1)]
    expected = ResidualCapture(model.model).capture(IDS).hidden[-1]
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 3], [0, -1, 2]])
def test_an_order_that_is_none(order):
    source = ResidualCapture(MockModel())
    with pytest.raises(ValueError, match="order of 3 blocks has one index from 0 to 2"), reordered_blocks(source.layers, order):
        pass


def test_the_classes_come_back_after_an_error():
    source = ResidualCapture(MockModel())
    classes = [type(layer) for layer in source.layers]
    with pytest.raises(ZeroDivisionError), reordered_blocks(source.layers, [1, 0, 2]):
        raise ZeroDivisionError
    assert [type(layer) for layer in source.layers] == classes


@pytest.mark.parametrize("model", [MockModel(), Mixed()], ids=["plain", "tuples"])
def test_an_edit_that_sees_the_input(model):
    source = ResidualCapture(model)
    seen = []

    def halved(given, output):
        seen.append(given)
        return given + (output - given) / 2

    edited = source.capture(IDS, {0: lambda h: 2 * h, 1: BlockEdit(halved)})
    # The input of block 1 is what the edit of block 0 has left.
    np.testing.assert_array_equal(np.array(seen[0]), np.array(edited.hidden[0]))
    output = model.layers[1](seen[0])
    output = output[0] if isinstance(output, tuple) else output
    np.testing.assert_allclose(np.array(edited.hidden[1]), np.array((seen[0] + output) / 2), rtol=1e-6, atol=1e-6)


def test_block_0_reads_the_embedding():
    model = MockModel()
    found = ResidualCapture(model).capture(IDS, {0: BlockEdit(lambda given, output: given)}, with_embedding=True)
    np.testing.assert_array_equal(np.array(found.hidden[0]), np.array(model.embed_tokens(IDS)))
    np.testing.assert_array_equal(np.array(found.embedding), np.array(model.embed_tokens(IDS)))


class Narrowing(Block):
    """Reads twice the width that it returns."""

    def __call__(self, x):
        return super().__call__(x[..., : x.shape[-1] // 2])


class Wide(MockModel):
    def __init__(self):
        super().__init__()
        self.layers = [Narrowing(self.layers[0].down.weight.shape[0])]

    def __call__(self, ids):
        x = self.embed_tokens(ids)
        return self.lm_head(self.norm(self.layers[0](mx.concatenate([x, x], axis=-1))))


def test_an_input_that_is_no_residual_stream():
    with pytest.raises(ResidualStreamError, match="input of block 0 is no residual stream"):
        ResidualCapture(Wide()).capture(IDS, {0: BlockEdit(lambda given, output: given)})


def test_edits_of_tokens_after_a_cache():
    source = ResidualCapture(tiny_llama(layers=3))
    assert isinstance(source.layers[0], nn.Module)

    def doubled(h):
        return mx.concatenate([h[:, :-1], 2 * h[:, -1:]], axis=1)

    whole = source.capture(IDS, {1: doubled})
    cache = source.new_cache()
    source.capture_next(IDS[:, :-1], cache)
    last = source.capture_next(IDS[:, -1:], cache, edits={1: doubled})
    for ours, expected in zip(last.hidden, whole.hidden, strict=True):
        np.testing.assert_allclose(np.array(ours[:, 0]), np.array(expected[:, -1]), rtol=1e-4, atol=1e-5)


def test_an_edited_input():
    model = MockModel()
    source = ResidualCapture(model)
    with edited_input(model.layers[0], lambda h: 2 * h):
        found = source.capture(IDS, with_embedding=True)
    np.testing.assert_allclose(np.array(found.hidden[0]), np.array(model.layers[0](2 * model.embed_tokens(IDS))), rtol=1e-6, atol=1e-6)
    # The capture sees what the model gave to the block.
    np.testing.assert_array_equal(np.array(found.embedding), np.array(model.embed_tokens(IDS)))


def test_a_block_without_a_stream():
    block = Block(DIM)
    with edited_input(block, lambda h: h), pytest.raises(ResidualStreamError, match="without a residual stream"):
        block(mx.zeros((2, DIM)))
