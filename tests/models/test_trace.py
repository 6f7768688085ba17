import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel
from support.mocks import DIM, LAYERS, VOCAB, Block, MockModel, WordTokenizer, tiny_llama

TEXT = "w3 w1 w4 w1"


@pytest.fixture
def model():
    return InterpretableModel(MockModel(), WordTokenizer())


def same(a, b):
    np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-6, atol=1e-6)


def test_names_of_activations(model):
    with model.trace(TEXT) as trace:
        pass
    inside = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in ("norm", "up", "down")]
    assert list(trace.activations) == [*(f"model.layers.{i}" for i in range(LAYERS)), *inside, "__model_output__"]
    assert all(trace.activations[f"model.layers.{i}"].shape == (1, 4, DIM) for i in range(LAYERS))
    assert trace.activations["__model_output__"].shape == (1, 4, VOCAB)


def test_names_in_an_mlx_lm_model():
    with InterpretableModel(tiny_llama(), WordTokenizer()).trace([1, 2]) as trace:
        pass
    outside = {"model.model.layers.0", "model.model.layers.1", "__model_output__"}
    assert outside < set(trace.activations)
    assert {f"model.model.layers.1.{name}" for name in ("self_attn", "mlp", "self_attn.q_proj", "mlp.down_proj")} < set(trace.activations)
    assert all(name.startswith("model.model.layers.") for name in set(trace.activations) - outside)


def test_values(model):
    states = model.capture(TEXT)
    with model.trace(TEXT) as trace:
        saved = [layer.output.save() for layer in model.layers]
    for i, hidden in enumerate(states.hidden):
        same(saved[i], hidden)
        same(trace.activations[f"model.layers.{i}"], hidden)
    same(trace.output, model(model.ids(TEXT)))
    same(trace.activations["__model_output__"], trace.output)


@pytest.mark.parametrize("inputs", [TEXT, [3, 1, 4, 1], mx.array([3, 1, 4, 1]), mx.array([[3, 1, 4, 1]]), [TEXT]])
def test_inputs(model, inputs):
    with model.trace(inputs) as trace:
        pass
    same(trace.output, model(mx.array([[3, 1, 4, 1]])))


def test_several_texts_are_padded_with_token_0(model):
    with model.trace(["w3 w1 w4", "w5"]) as trace:
        pass
    same(trace.output, model(mx.array([[3, 1, 4], [5, 0, 0]])))


@pytest.mark.parametrize("inputs", ["", [VOCAB], [-1]])
def test_impossible_inputs(model, inputs):
    with pytest.raises(ValueError, match=r"no tokens|outside the model's vocabulary"), model.trace(inputs):
        pass


def test_an_output_stays_until_the_next_trace(model):
    with model.trace(TEXT):
        pass
    first = model.layers[1].output.save()
    same(first, model.capture(TEXT).hidden[1])
    with model.trace("w7"):
        pass
    assert model.layers[1].output.shape == (1, 1, DIM)
    same(first, model.capture(TEXT).hidden[1])


def test_outputs_act_like_arrays(model):
    with model.trace(TEXT):
        output = model.layers[0].output
    assert output.shape == (1, 4, DIM)
    assert output.dtype == mx.float32
    same(output[0, -1], output.save()[0, -1])
    same(output[:, 1:3], output.save()[:, 1:3])


def test_an_output_before_any_trace(model):
    with pytest.raises(RuntimeError, match="Nothing has been traced yet"):
        _ = model.layers[0].output


def test_proxies_reach_the_blocks(model):
    assert len(model.layers) == LAYERS
    assert model.layers[1].up.module is model.model.layers[1].up
    assert model.layers[1].up.weight is model.model.layers[1].up.weight
    x = mx.ones((1, 2, DIM))
    assert mx.array_equal(model.layers[1].norm(x), model.model.layers[1].norm(x))
    assert [layer.index for layer in model.layers] == list(range(LAYERS))
    with pytest.raises(AttributeError):
        _ = model.layers[0].nonsense
    with pytest.raises(IndexError):
        _ = model.layers[LAYERS]


def test_what_is_set_on_a_proxy_is_set_in_the_model(model):
    """A proxy is made anew at each access: what only the proxy took would be lost."""
    ids = mx.array([[3, 1, 4, 1]])
    before = model(ids)
    weight = model.layers[1].up.weight * 2
    model.layers[1].up.weight = weight
    assert model.model.layers[1].up.weight is weight
    after = model(ids)
    assert mx.max(mx.abs(after - before)).item() > 1e-3
    model.layers[1].up["weight"] = weight / 2
    same(model(ids), before)
    assert mx.array_equal(model.layers[1].up["weight"], weight / 2)
    assert ("weight" in model.layers[1].up, "scales" in model.layers[1].up) == (True, False)
    model.layers[1].up = model.model.layers[0].up
    assert model.model.layers[1].up is model.model.layers[0].up
    for name in ("output", "module"):
        with pytest.raises(AttributeError, match=f"{name} of a module in a trace can only be read"):
            setattr(model.layers[1], name, None)


def test_an_exception_inside_a_trace_comes_out(model):
    with pytest.raises(ZeroDivisionError), model.trace(TEXT):
        raise ZeroDivisionError
    assert [type(layer) for layer in model.model.layers] == [Block] * LAYERS


@pytest.mark.parametrize("key", [1, "model.layers.1", "layers.1", "model.model.layers.1", "h.1", "transformer.blocks.1"])
def test_interventions_by_number_or_name(model, key):
    plain = model.capture(TEXT)
    with model.trace(TEXT, interventions={key: lambda h: h * 0}) as trace:
        saved = model.layers[1].output.save()
    same(saved, mx.zeros_like(plain.hidden[1]))
    same(trace.activations["model.layers.0"], plain.hidden[0])
    same(trace.activations["model.layers.2"], model.model.layers[2](saved))
    same(trace.output, model.model.lm_head(model.model.norm(trace.activations["model.layers.2"])))


def test_an_intervention_ends_with_its_trace(model):
    plain = model(model.ids(TEXT))
    with model.trace(TEXT, interventions={0: lambda h: h + 5}) as trace:
        pass
    assert mx.max(mx.abs(trace.output - plain)).item() > 1e-2
    same(model(model.ids(TEXT)), plain)


@pytest.mark.parametrize("key", [LAYERS, -1, f"model.layers.{LAYERS}", "lm_head", "layers.9.mlp", "mylayers.1"])
def test_interventions_on_blocks_that_are_not_there(model, key):
    with pytest.raises(ValueError, match=rf"No block {key!r} to intervene on: give an index from 0 to {LAYERS - 1}"):
        model.trace(TEXT, interventions={key: lambda h: h})
