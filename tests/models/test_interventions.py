"""Interventions by name, and the functions that make them."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gpt2

from metalens import InterpretableModel
from metalens.models import interventions as iv
from support.mocks import randomize, tiny_llama

IDS = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def model():
    return InterpretableModel(tiny_llama(layers=3))


def same(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.array(a), np.array(b), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- in a trace


def test_outputs_inside_a_block(model):
    """A llama's block adds what its attention and its MLP return."""
    with model.trace(IDS) as trace:
        attention, mlp = (model.layers[1].self_attn.output.save(), model.layers[1].mlp.output.save())
        logits = model.output.save()
    same(logits, trace.output)
    same(trace.activations["model.model.layers.1.mlp"], mlp)
    same(trace.states.hidden[0] + attention + mlp, trace.states.hidden[1])
    block = model.model.model.layers[1]
    middle = trace.states.hidden[0] + attention
    same(model.layers[1].mlp.gate_proj.output.save(), block.mlp.gate_proj(block.post_attention_layernorm(middle)))
    assert model.layers[1].attn.output.shape == attention.shape  # mlxterp's other name


@pytest.mark.parametrize("key", ["layers.1.mlp", "model.layers.1.mlp", "model.model.layers.1.mlp"])
def test_an_intervention_inside_a_block(model, key):
    plain = model.capture(IDS)
    with model.trace(IDS, interventions={key: iv.zero_out}) as trace:
        assert not mx.any(model.layers[1].mlp.output.save()).item()
        attention = model.layers[1].self_attn.output.save()
    same(trace.states.hidden[0], plain.hidden[0])
    same(trace.states.hidden[1], plain.hidden[0] + attention)
    same(trace.states.hidden[2], model.source.capture(model.ids(IDS), {1: lambda _: trace.states.hidden[1]}).hidden[2])
    same(model.capture(IDS).logits, plain.logits)  # it ends with its trace


def test_a_block_and_its_parts_together(model):
    with model.trace(IDS, interventions={"layers.0.self_attn": iv.zero_out, 0: iv.scale(2.0)}) as trace:
        mlp = model.layers[0].mlp.output.save()
    embedded = model.model.model.embed_tokens(mx.array([IDS]))
    same(trace.states.hidden[0], 2 * (embedded + mlp))


def test_a_module_of_several_outputs_or_with_another_name():
    args = gpt2.ModelArgs(model_type="gpt2", n_ctx=16, n_embd=32, n_head=2, n_layer=2, n_positions=16, layer_norm_epsilon=1e-5, vocab_size=50)
    model = InterpretableModel(randomize(gpt2.Model(args), size=0.1))
    with model.trace(IDS) as trace:
        same(model.layers[1].self_attn.output.save(), trace.activations[f"model.{model.source.path}.1.attn"])
    with model.trace(IDS, interventions={"h.1.self_attn": iv.zero_out}) as changed:
        pass
    assert mx.max(mx.abs(changed.output - trace.output)).item() > 1e-4


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (3, "No block 3"),
        ("layers.3.mlp", r"No block 'layers\.3\.mlp'"),
        ("mlp", "No block 'mlp'"),
        ("layers.0.nonsense", "Block 0 has no module 'nonsense'. Its modules are .*mlp"),
        ("layers.0.mlp.nonsense", "Block 0 has no module 'mlp.nonsense'"),
    ],
)
def test_places_that_are_not_there(model, key, message):
    with pytest.raises(ValueError, match=message):
        model.trace(IDS, interventions={key: iv.zero_out})


def test_before_any_trace():
    model = InterpretableModel(tiny_llama())
    for read in (lambda: model.output, lambda: model.layers[0].mlp.output):
        with pytest.raises(RuntimeError, match="Nothing has been traced yet"):
            read()


def test_a_module_that_did_not_run():
    model = InterpretableModel(tiny_llama())
    model.model.model.layers[0].unused = tiny_llama().model.norm
    with model.trace(IDS):
        pass
    with pytest.raises(RuntimeError, match="unused of block 0 did not run in the latest trace"):
        _ = model.layers[0].unused.output


# ---------------------------------------------------------------- the functions


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_the_functions(rng, dtype):
    h = rng.normal(size=(2, 4, 3)).astype(np.float32)
    x, v = mx.array(h).astype(dtype), rng.normal(size=3).astype(np.float32)
    h = np.array(x.astype(mx.float32))
    tolerance = 1e-6 if dtype == mx.float32 else 2e-2
    for function, expected in (
        (iv.zero_out, 0 * h),
        (iv.scale(-0.5), -0.5 * h),
        (iv.add_vector(mx.array(v)), h + v),
        (iv.replace_with(2.5), np.full(h.shape, 2.5)),
        (iv.replace_with(mx.array(v)), np.broadcast_to(v, h.shape)),
        (iv.replace_with(mx.array(h + 1)), h + 1),
        (iv.clamp(-0.3, 0.2), np.clip(h, -0.3, 0.2)),
        (iv.clamp(min_val=0.1), np.maximum(h, 0.1)),
        (iv.clamp(), h),
        (iv.compose().add(iv.scale(2.0)).add(iv.add_vector(mx.array(v))).build(), 2 * h + v),
        (iv.compose().build(), h),
    ):
        found = function(x)
        assert (found.shape, found.dtype) == (x.shape, dtype)
        same(found.astype(mx.float32), expected, tolerance)
    np.testing.assert_array_equal(np.array(x.astype(mx.float32)), h)


@pytest.mark.parametrize(("tokens", "align"), [(2, "end"), (2, "start"), (6, "end"), (6, "start")])
def test_a_value_of_another_length(rng, tokens, align):
    h, value = rng.normal(size=(1, 4, 3)).astype(np.float32), rng.normal(size=(1, tokens, 3)).astype(np.float32)
    found, n, expected = np.array(iv.replace_with(mx.array(value), align)(mx.array(h))), min(4, tokens), h.copy()
    if align == "end":
        expected[:, -n:] = value[:, -n:]
    else:
        expected[:, :n] = value[:, :n]
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="The value to put in has shape"):
        iv.replace_with(mx.array(value), "strict")(mx.array(h))


def test_values_that_do_not_fit():
    with pytest.raises(ValueError, match="align must be"):
        iv.replace_with(0.0, "middle")
    with pytest.raises(ValueError, match="does not fit a state"):
        iv.replace_with(mx.zeros((5,)))(mx.zeros((1, 4, 3)))


def test_noise():
    x = mx.zeros((50, 40, 5))
    mx.random.seed(3)
    expected = mx.random.normal((4,))
    mx.random.seed(3)
    edit = iv.noise(0.3, seed=1)
    first, second, again = edit(x), edit(x), iv.noise(0.3, seed=1)(x)
    assert mx.array_equal(mx.random.normal((4,)), expected)  # MLX's state is the user's
    assert mx.array_equal(first, again)
    assert not mx.array_equal(first, second)
    assert mx.std(first).item() == pytest.approx(0.3, rel=0.05)
