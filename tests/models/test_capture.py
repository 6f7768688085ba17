import gc
import weakref
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import mamba
from mlx_lm.models.base import create_attention_mask

from metalens import InterpretableModel
from metalens.models.blocks import LayersNotFoundError, find_layers, follow
from metalens.models.capture import ResidualCapture
from metalens.utils.errors import MetalensError
from support.mocks import DIM, LAYERS, Block, MockModel, WordTokenizer, tiny_llama

IDS = mx.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def same(a, b):
    np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-6, atol=1e-6)


class TupleBlock(Block):
    """Returns (hidden states, something else), as blocks with a state do."""

    def __call__(self, x):
        return super().__call__(x), "state"


class TupleModel(MockModel):
    """Reads the second part of the outputs of its blocks."""

    def __init__(self, outputs: Any = tuple):
        super().__init__(block=TupleBlock)
        self.outputs = outputs

    def __call__(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x, state = layer(x)
            assert state == "state"
        return self.outputs([self.lm_head(self.norm(x)), "cache"])


class Failing(Block):
    def __call__(self, x):
        raise ZeroDivisionError("in the middle of the model")


class Repeating(MockModel):
    """Runs its second block twice."""

    def __call__(self, ids):
        x = self.embed_tokens(ids)
        for layer in (self.layers[0], self.layers[1], self.layers[1], self.layers[2]):
            x = layer(x)
        return self.lm_head(self.norm(x))


class Skipping(MockModel):
    """Does not run its last block."""

    def __call__(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers[:-1]:
            x = layer(x)
        return self.lm_head(self.norm(x))


# ---------------------------------------------------------------- capture


def test_hidden_states_are_the_outputs_of_the_blocks():
    model = MockModel()
    states = ResidualCapture(model).capture(IDS)
    x = model.embed_tokens(IDS)
    assert len(states.hidden) == LAYERS
    for block, hidden in zip(model.layers, states.hidden, strict=True):
        x = block(x)
        assert hidden.shape == (2, 5, DIM)
        same(hidden, x)
    same(states.logits, model.lm_head(model.norm(x)))
    same(states.logits, model(IDS))


def test_hidden_states_of_an_mlx_lm_model():
    model = tiny_llama(layers=3)
    states = ResidualCapture(model).capture(IDS)
    x = model.model.embed_tokens(IDS)
    mask = create_attention_mask(x, None)
    for block, hidden in zip(model.model.layers, states.hidden, strict=True):
        x = block(x, mask, None)
        same(hidden, x)
    same(states.logits, model(IDS))


# ---------------------------------------------------------------- padding, long sequences


def test_padding_changes_nothing_before_it(rng):
    """A causal model computes the tokens of a padded sequence as if there were no padding."""
    source = ResidualCapture(tiny_llama(layers=3))
    rows = [rng.integers(0, 96, n) for n in (7, 1, 4)]
    ids = np.zeros((3, 7), np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    padded = source.capture(mx.array(ids), mask=mx.arange(7) < mx.array([[7], [1], [4]]))
    alone = [source.capture(mx.array(values[None])) for values in rows]
    for layer in range(3):
        found = padded.rows(layer)
        assert found.shape == (12, 64)
        same(found, mx.concatenate([states.rows(layer) for states in alone]))


def test_rows_without_padding_are_all():
    states = ResidualCapture(MockModel()).capture(IDS)
    assert mx.array_equal(states.rows(1), states.hidden[1].reshape(10, DIM))
    whole = ResidualCapture(MockModel()).capture(IDS, mask=mx.ones(IDS.shape, mx.bool_))
    assert mx.array_equal(whole.rows(1), states.rows(1))


@pytest.mark.parametrize(
    ("mask", "words"), [([[0, 1, 1, 1, 1], [1] * 5], "follows padding"), ([[1, 0, 1, 1, 0], [1] * 5], "follows padding"), ([[1] * 5], "must be")]
)
def test_masks_that_are_not_padding_at_the_end(mask, words):
    with pytest.raises(ValueError, match=words):
        ResidualCapture(MockModel()).capture(IDS, mask=mx.array(mask))


def test_texts_are_padded_with_a_mask():
    model = InterpretableModel(MockModel(), WordTokenizer())
    states = model.capture(["w1 w2 w3", "w4"])
    assert states.mask.tolist() == [[True, True, True], [True, False, False]]
    assert states.rows(0).shape == (4, DIM)
    assert model.capture(["w1 w2", "w3 w4"]).mask is None


@pytest.mark.parametrize("tokens", [1, 2, 7, 20])
def test_chunks_of_a_long_sequence(tokens, rng):
    source = ResidualCapture(tiny_llama(layers=3))
    ids = mx.array(rng.integers(0, 96, (2, 13)))
    whole, chunks = source.capture(ids), list(source.chunks(ids, tokens))
    assert [chunk.logits.shape[1] for chunk in chunks] == [min(tokens, 13 - start) for start in range(0, 13, tokens)]
    for layer in range(3):
        np.testing.assert_allclose(
            np.array(mx.concatenate([chunk.hidden[layer] for chunk in chunks], axis=1)), np.array(whole.hidden[layer]), atol=1e-5
        )


def test_chunks_need_a_length():
    with pytest.raises(ValueError, match="at least 1"):
        next(ResidualCapture(tiny_llama()).chunks(IDS, 0))


class ChangingInPlace(MockModel):
    """Changes the output of its last block in place."""

    def __call__(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        x *= 2
        return self.lm_head(self.norm(x))


def test_hidden_states_are_what_the_block_returned_whatever_the_model_does_to_it():
    same(ResidualCapture(ChangingInPlace()).capture(IDS).hidden[-1], ResidualCapture(MockModel()).capture(IDS).hidden[-1])


def test_nothing_is_left_behind():
    model = MockModel()
    before = [vars(layer).copy() for layer in model.layers]
    source = ResidualCapture(model)
    a = source.capture(IDS)
    assert [type(layer) for layer in model.layers] == [Block] * LAYERS
    assert [vars(layer) for layer in model.layers] == before
    b = source.capture(IDS)
    for x, y in zip(a.hidden, b.hidden, strict=True):
        same(x, y)


def test_arrays_are_freed_without_the_garbage_collector():
    """The temporary classes of the blocks stay until a garbage collection, and must not keep a batch of hidden states with them."""
    source, kept = ResidualCapture(MockModel()), []

    def edit(h):
        edited = h + 1
        kept.append(weakref.ref(edited))
        return edited

    gc.collect()
    gc.disable()
    try:
        states = source.capture(IDS, {0: edit})
        kept += [weakref.ref(h) for h in (*states.hidden, states.logits)]
        del states
        assert len(kept) == LAYERS + 2
        assert all(reference() is None for reference in kept)
    finally:
        gc.enable()


def test_blocks_keep_their_type_and_attributes_while_they_are_recorded():
    seen = []

    class Curious(Block):
        kind = "attention"

        def __call__(self, x):
            seen.append((isinstance(self, Curious), type(self).__name__, self.kind, hasattr(self, "up")))
            return super().__call__(x)

    ResidualCapture(MockModel(block=Curious)).capture(IDS)
    assert seen == [(True, "Curious", "attention", True)] * LAYERS


def test_classes_come_back_after_an_exception():
    model = MockModel()
    model.layers[1] = Failing(DIM)
    with pytest.raises(ZeroDivisionError, match="in the middle"):
        ResidualCapture(model).capture(IDS)
    assert [type(layer) for layer in model.layers] == [Block, Failing, Block]


def test_classes_come_back_when_an_edit_fails():
    model = MockModel()

    def edit(h):
        raise KeyError("edit")

    with pytest.raises(KeyError):
        ResidualCapture(model).capture(IDS, {0: edit})
    assert [type(layer) for layer in model.layers] == [Block] * LAYERS


def test_blocks_of_different_classes():
    class Other(Block):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = MockModel()
    model.layers[1] = Other(DIM)
    states = ResidualCapture(model).capture(IDS)
    same(states.hidden[1], model.layers[1](states.hidden[0]))
    same(states.hidden[2], model.layers[2](states.hidden[1]))
    assert [type(layer) for layer in model.layers] == [Block, Other, Block]


@pytest.mark.parametrize("outputs", [tuple, list])
def test_blocks_and_models_that_return_several_things(outputs):
    model = TupleModel(outputs)
    states = ResidualCapture(model).capture(IDS)
    assert all(isinstance(h, mx.array) for h in states.hidden)
    same(states.logits, model(IDS)[0])
    same(states.hidden[2], model.layers[2](states.hidden[1])[0])


def test_mamba_has_no_attention_and_is_captured_all_the_same():
    args = mamba.ModelArgs(
        model_type="mamba", vocab_size=50, hidden_size=16, intermediate_size=32, state_size=4, num_hidden_layers=2, conv_kernel=3, use_bias=False,
        use_conv_bias=True, time_step_rank=2,
    )  # fmt: skip
    model = mamba.Model(args)
    states = ResidualCapture(model).capture(IDS)
    assert [h.shape for h in states.hidden] == [(2, 5, 16)] * 2
    same(states.logits, model(IDS))


@pytest.mark.parametrize(("model", "message"), [(Repeating, r"Blocks \[1\] ran \[2\] times"), (Skipping, r"Blocks \[2\] ran \[0\] times")])
def test_blocks_that_do_not_run_exactly_once(model, message):
    model = model()
    with pytest.raises(RuntimeError, match=message):
        ResidualCapture(model).capture(IDS)
    assert [type(layer) for layer in model.layers] == [Block] * LAYERS


def test_one_block_at_two_indices():
    model = MockModel()
    model.layers = [model.layers[0], model.layers[0], model.layers[1]]
    with pytest.raises(RuntimeError, match="exactly once is needed"):
        ResidualCapture(model).capture(IDS)
    assert [type(layer) for layer in model.layers] == [Block] * LAYERS


# ---------------------------------------------------------------- edits


def test_an_edit_takes_the_place_of_the_output():
    model = MockModel()
    source = ResidualCapture(model)
    plain, edited = source.capture(IDS), source.capture(IDS, {1: lambda h: h + 1})
    same(edited.hidden[0], plain.hidden[0])
    same(edited.hidden[1], plain.hidden[1] + 1)
    same(edited.hidden[2], model.layers[2](plain.hidden[1] + 1))
    same(edited.logits, model.lm_head(model.norm(edited.hidden[2])))
    assert mx.max(mx.abs(edited.logits - plain.logits)).item() > 1e-3
    same(source.capture(IDS).logits, plain.logits)


def test_edits_of_several_blocks_see_each_other():
    source = ResidualCapture(MockModel())
    edited = source.capture(IDS, {0: mx.zeros_like, 1: lambda h: 2 * h})
    same(edited.hidden[0], mx.zeros((2, 5, DIM)))
    same(edited.hidden[1], 2 * source.model.layers[1](mx.zeros((2, 5, DIM))))


@pytest.mark.parametrize("outputs", [tuple, list])
def test_an_edit_of_a_block_that_returns_several_things(outputs):
    model = TupleModel(outputs)
    edited = ResidualCapture(model).capture(IDS, {2: mx.zeros_like})
    same(edited.hidden[2], mx.zeros((2, 5, DIM)))
    same(edited.logits, model.lm_head(model.norm(mx.zeros((2, 5, DIM)))))


# ---------------------------------------------------------------- finding blocks


class Box(nn.Module):
    """A module with the given attributes."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


BLOCKS = [Block(4), Block(4)]


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (Box(layers=BLOCKS), "layers"),
        (Box(model=Box(layers=BLOCKS)), "model.layers"),
        (Box(language_model=Box(model=Box(layers=BLOCKS))), "language_model.model.layers"),
        (Box(backbone=Box(layers=BLOCKS)), "backbone.layers"),
        (Box(transformer=Box(h=BLOCKS)), "transformer.h"),
        (Box(model=Box(h=BLOCKS)), "model.h"),
        (Box(transformer=Box(blocks=BLOCKS)), "transformer.blocks"),
    ],
)
def test_the_usual_paths(model, path):
    found, layers = find_layers(model)
    assert found == path
    assert list(map(id, layers)) == list(map(id, BLOCKS))


@pytest.mark.parametrize(
    ("model", "attribute", "path"),
    [
        (Box(stack=BLOCKS), "stack", "stack"),
        (Box(model=Box(stack=BLOCKS)), "stack", "model.stack"),
        (Box(decoder=Box(stack=BLOCKS)), "decoder.stack", "decoder.stack"),
        (Box(model=Box(decoder=Box(stack=BLOCKS))), "decoder.stack", "model.decoder.stack"),
        (Box(towers=[Box(stack=[Block(4)]), Box(stack=BLOCKS)]), "towers.1.stack", "towers.1.stack"),
    ],
)
def test_a_path_that_the_caller_names(model, attribute, path):
    found, layers = find_layers(model, attribute)
    assert found == path
    assert len(layers) == 2


def test_a_property_gives_way_to_the_path_of_the_list_itself():
    model = tiny_llama()
    path, layers = find_layers(model)
    assert path == "model.layers"
    assert layers is model.model.layers


@pytest.mark.parametrize(
    ("model", "attribute"),
    [(Box(), "layers"), (Box(layers=[]), "layers"), (Box(layers=Block(4)), "layers"), (Box(layers=BLOCKS), "stack"), (object(), "layers")],
)
def test_a_model_without_blocks(model, attribute):
    with pytest.raises(AttributeError, match=rf"Could not find layers attribute\. Tried: \['{attribute}', 'model\.{attribute}'.*layer_attr") as error:
        ResidualCapture(model, attribute)
    assert "transformer.h" in str(error.value) or attribute != "layers"
    assert isinstance(error.value, MetalensError)
    assert type(error.value) is LayersNotFoundError


def test_following_paths():
    root = Box(a=[Box(b=1), Box(b=2)])
    assert follow(root, "a.1.b") == 2
    assert follow(root, "a.2.b") is None
    assert follow(root, "a.x") is None
    assert follow(root, "c.d") is None
