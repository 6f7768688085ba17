from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from metalens import InterpretableModel, _ext, _extension, accelerate, use_backend
from metalens.models.language_model import LanguageModel
from metalens.ops import use_precision
from metalens.ops.weight import Weight
from support import oracle

IDS = mx.array([[3, 130, 7, 0, 55, 55, 91, 12, 4]])
KINDS = {"dense": {"bits": None}, "4 bits": {"bits": 4}, "3 bits in groups of 64": {"bits": 3, "group_size": 64}, "8 bits": {"bits": 8}}

# Layers of make_llama() that are switched: 21 projections, embedding and head; attention, rotation, gate and two norms of three blocks; last norm.
NATIVE = 39


@pytest.fixture
def calls(monkeypatch):
    """The names of the extension's operations that were called, with the native backend."""
    _extension.find()  # calls the extension itself, once per process
    counted = []

    def spy_on(name):
        kept = getattr(_ext, name)
        monkeypatch.setattr(_ext, name, lambda *args: (counted.append(name), kept(*args))[1])

    spy_on("matmul")
    spy_on("quantized_matmul")
    with use_backend("native"):
        yield counted


def classes(model):
    return {path: type(module) for path, module in model.named_modules()}


def switched(model):
    return [module for _, module in model.named_modules() if type(module) in (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_outputs_are_the_model_s_own_within_rounding(make_llama, calls, kind, tied):
    model = make_llama(tied=tied, **kind)
    expected = oracle.wide(model(IDS))
    with accelerate(model):
        ours = model(IDS)
    assert ours.dtype == mx.float32
    np.testing.assert_allclose(oracle.wide(ours), expected, atol=1e-5 * np.abs(expected).max())
    # Seven projections in each of three blocks, and the head, whether it is a layer or the embedding.
    assert calls == ["matmul" if kind["bits"] is None else "quantized_matmul"] * 22


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("dtype", "operands"), [(mx.float16, "float32"), (mx.bfloat16, "float32"), (mx.bfloat16, "bfloat16")], ids=str)
@pytest.mark.parametrize("bits", [None, 4])
def test_16_bit_models_are_no_further_from_the_truth_than_before(make_llama, tied, dtype, bits, operands):
    model, exact = (make_llama(tied=tied, bits=bits, dtype=dtype) for _ in range(2))
    exact.set_dtype(mx.float32)  # the same weights, computed in float32
    truth = oracle.wide(exact(IDS))
    before = model(IDS)
    with accelerate(model), use_precision(operands):
        after = model(IDS)
    assert after.dtype == before.dtype == dtype
    error_before, error_after = (np.sqrt(np.mean((oracle.wide(y) - truth) ** 2)) for y in (before, after))
    assert error_after <= 1.2 * error_before


def test_undo_restores_classes_and_every_bit(make_llama):
    model = make_llama()
    before, classes_before = model(IDS), classes(model)
    acceleration = accelerate(model)
    assert classes(model) != classes_before
    acceleration.undo()
    assert classes(model) == classes_before
    assert mx.array_equal(model(IDS), before)
    acceleration.undo()  # again, which does nothing
    assert classes(model) == classes_before


def test_it_is_a_context_manager_that_also_ends_with_an_exception(make_llama):
    model = make_llama()
    before = classes(model)
    with accelerate(model) as acceleration:
        assert len(acceleration) == NATIVE
        assert classes(model) != before
    assert classes(model) == before
    assert len(acceleration) == 0
    with pytest.raises(KeyError), accelerate(model):
        raise KeyError
    assert classes(model) == before


def test_a_second_call_swaps_nothing_and_its_undo_leaves_the_first(make_llama):
    model = make_llama()
    before = classes(model)
    first = accelerate(model)
    during = classes(model)
    with accelerate(model) as second:
        assert len(second) == 0
    assert classes(model) == during
    first.undo()
    assert classes(model) == before


def test_a_layer_that_is_used_twice_is_restored(make_llama):
    model = make_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    before, logits = classes(model), model(IDS)
    with accelerate(model):
        np.testing.assert_allclose(oracle.wide(model(IDS)), oracle.wide(logits), atol=1e-4)
    assert classes(model) == before


def test_the_model_stays_what_it_was_for_others(make_llama):
    model = make_llama(tied=True, bits=None)
    names = [name for name, _ in tree_flatten(model.parameters())]
    kinds = [nn.Linear if isinstance(m, nn.Linear) else nn.Embedding for m in switched(model)]
    layers = switched(model)
    with accelerate(model):
        assert [name for name, _ in tree_flatten(model.parameters())] == names
        assert not model.training
        assert all(isinstance(layer, kind) for layer, kind in zip(layers, kinds, strict=True))
        assert mx.array_equal(model.model.embed_tokens(IDS), model.model.embed_tokens.weight[IDS])
        assert not switched(model)


def test_weights_are_read_at_the_call(make_llama):
    layer = nn.Linear(64, 5, bias=True)
    x = mx.ones((2, 64))
    with accelerate(layer):
        layer.weight = mx.zeros((5, 64))
        layer.bias = mx.arange(5).astype(mx.float32)
        assert layer(x).tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0]] * 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_single_layers_with_and_without_bias(rng, calls, quantized, bias):
    layer = nn.Linear(128, 33, bias=bias)
    if bias:
        layer.bias = oracle.random_array(rng, 33)
    if quantized:
        layer = nn.QuantizedLinear.from_linear(layer, 64, 4)
    x = oracle.random_array(rng, 2, 3, 128)
    expected = layer(x)
    with accelerate(layer) as acceleration:
        assert len(acceleration) == 1
        np.testing.assert_allclose(oracle.wide(layer(x)), oracle.wide(expected), atol=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_dense_layer_adds_its_bias_before_it_rounds(rng, dtype):
    """Plain MLX rounds once. A product that is rounded before the sum was off by up to one and a half times as much."""
    layer = nn.Linear(64, 48)
    layer.bias = oracle.random_array(rng, 48)
    layer.apply(lambda p: p.astype(dtype))
    x = oracle.random_array(rng, 33, 64).astype(dtype)
    exact = oracle.wide(x) @ oracle.wide(layer.weight).T + oracle.wide(layer.bias)
    with accelerate(layer):
        found = layer(x)
    assert found.dtype == dtype
    half_a_unit = np.abs(oracle.wide(found)) * (2.0**-11 if dtype == mx.float16 else 2.0**-8)
    assert (np.abs(oracle.wide(found) - exact) <= half_a_unit + 1e-6).all()


def test_gradients_flow_through_it(rng):
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1))
    x = oracle.random_array(rng, 5, 64)
    gradient = nn.value_and_grad(model, lambda x: mx.sum(model(x)))
    expected = tree_flatten(gradient(x)[1])
    with accelerate(model):
        ours = tree_flatten(gradient(x)[1])
    assert [name for name, _ in ours] == [name for name, _ in expected]
    for (_, a), (_, b) in zip(ours, expected, strict=True):
        np.testing.assert_allclose(oracle.wide(a), oracle.wide(b), atol=1e-5)


@pytest.mark.parametrize("mode", oracle.FLOAT_MODES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_layers_of_the_8_bit_scaled_formats_run_natively(make_llama, calls, tied, mode):
    bits, group_size = oracle.FLOAT_MODES[mode]
    model = make_llama(tied=tied, mode=mode, group_size=group_size, bits=bits)
    expected = oracle.wide(model(IDS))
    with accelerate(model):
        np.testing.assert_allclose(oracle.wide(model(IDS)), expected, atol=1e-5 * np.abs(expected).max())
    assert calls == ["quantized_matmul"] * 22


def test_the_reference_backend_is_the_model_as_it_was(make_llama, calls):
    model = make_llama()
    before = model(IDS)
    with accelerate(model), use_backend("reference"):
        assert mx.array_equal(model(IDS), before)
    assert not calls


class Adapted(nn.Linear):
    """A linear layer with a call of its own, like LoRA layers."""

    def __call__(self, x):
        return super().__call__(x) + 1


class AdaptedEmbedding(nn.QuantizedEmbedding):
    def as_linear(self, x):
        return super().as_linear(x) + 1


def test_subclasses_keep_their_own_call(rng):
    model = nn.Sequential(Adapted(64, 64), nn.Linear(64, 64))
    embedding = AdaptedEmbedding(131, 64, 32, 4)
    x = oracle.random_array(rng, 3, 64)
    expected, tied = model(x), embedding.as_linear(x)
    with accelerate(model) as acceleration, accelerate(embedding) as nothing:
        assert (len(acceleration), len(nothing)) == (1, 0)
        assert type(model.layers[0]) is Adapted
        np.testing.assert_allclose(oracle.wide(model(x)), oracle.wide(expected), atol=1e-5)
        assert mx.array_equal(embedding.as_linear(x), tied)


@pytest.mark.parametrize("thing", [None, "model", 3, lambda x: x])
def test_other_objects_are_refused(thing):
    with pytest.raises(TypeError, match=r"mlx\.nn\.Module"):
        accelerate(thing)


@pytest.mark.parametrize("kind", [LanguageModel, InterpretableModel])
def test_a_wrapped_model_is_accelerated_like_its_module(make_llama, kind):
    model = kind(make_llama(), accelerate=False)
    before, logits = classes(model.model), oracle.wide(model(IDS))
    with accelerate(model) as acceleration:
        assert len(acceleration) == NATIVE
        np.testing.assert_allclose(oracle.wide(model(IDS)), logits, atol=1e-4)
    assert classes(model.model) == before


class Shifted(nn.Module):
    """A norm of its own that calls MLX's function, and an activation of `nn`, like Gemma's."""

    def __init__(self):
        super().__init__()
        self.weight = mx.full((8,), 0.5)

    def __call__(self, x):
        return nn.gelu_approx(mx.fast.rms_norm(x, 1.0 + self.weight, 1e-5)) + mx.square(x)


def test_functions_of_mlx_are_replaced_in_the_layer_alone(rng, monkeypatch, native):
    used = []
    for name in ("rms_norm", "gelu_tanh", "layer_norm", "rope"):
        kept = getattr(_ext, name)
        monkeypatch.setattr(_ext, name, lambda *args, name=name, kept=kept: (used.append(name), kept(*args))[1])
    layer, x = Shifted(), oracle.random_array(rng, 3, 8)
    plain = layer(x)
    with accelerate(layer) as acceleration:
        assert len(acceleration) == 1
        np.testing.assert_allclose(np.array(layer(x)), np.array(plain), atol=1e-5)
    assert used == ["rms_norm", "gelu_tanh"]
    assert mx.array_equal(layer(x), plain)
    assert mx.fast.rms_norm is not _ext.rms_norm
    for made, name in ((nn.LayerNorm(8), "layer_norm"), (nn.RMSNorm(8), "rms_norm"), (nn.RoPE(8), "rope")):
        x = oracle.random_array(rng, 1, 2, 3, 8)
        plain = made(x)
        with accelerate(made):
            np.testing.assert_allclose(np.array(made(x)), np.array(plain), atol=1e-5)
        assert used.pop() == name


def test_residual_sums_of_a_capture_run_natively_and_keep_every_bit(make_llama, monkeypatch):
    model = InterpretableModel(make_llama(dtype=mx.float16), accelerate=False)
    plain = [np.array(h) for h in model.source.capture(IDS).hidden]
    seen, kept = [], _ext.run_sums_natively
    monkeypatch.setattr(_ext, "run_sums_natively", lambda outputs: (seen.append(len(outputs)), kept(outputs))[1])
    with use_backend("native"):
        states = model.source.capture(IDS)
        assert all((np.array(h) == p).all() for h, p in zip(states.hidden, plain, strict=True))
    assert seen == [4]  # three blocks and the logits


# ---------------------------------------------------------------- LanguageModel(accelerate=...)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))


def test_a_loaded_model_uses_the_native_kernels_by_itself_and_undo_gives_it_back(make_llama, native):
    plain, module = make_llama(), make_llama()
    before, logits = classes(module), oracle.wide(plain(IDS))
    model = LanguageModel(module)
    assert len(model.acceleration) == NATIVE
    assert classes(module) != before
    np.testing.assert_allclose(oracle.wide(model(IDS)), logits, atol=1e-5 * np.abs(logits).max())
    np.testing.assert_allclose(oracle.wide(model.unembed(model.source.capture(IDS).hidden[-1])), logits, atol=1e-4)
    model.acceleration.undo()
    assert classes(module) == before
    assert mx.array_equal(model(IDS), plain(IDS))


def test_auto_means_the_default_backend_on_a_cpu_too(make_llama, monkeypatch):
    monkeypatch.delenv("METALENS_BACKEND", raising=False)
    assert len(LanguageModel(make_llama()).acceleration) == NATIVE


@pytest.mark.parametrize("wanted", ["auto", False])
def test_the_reference_backend_and_false_leave_a_model_as_it_was(make_llama, monkeypatch, wanted):
    if wanted == "auto":
        monkeypatch.setenv("METALENS_BACKEND", "reference")
    module = make_llama()
    before = classes(module)
    model = LanguageModel(module, accelerate=wanted)
    assert classes(module) == before
    reason = "the backend is 'reference'" if wanted == "auto" else "accelerate=False"
    assert repr(model.acceleration) == f"0 layers on native kernels ({reason})"


def test_auto_leaves_a_model_on_a_gpu_as_it_was(make_llama, on_a_gpu):
    module = make_llama()
    before = classes(module)
    model = LanguageModel(module)
    assert classes(module) == before
    assert repr(model.acceleration) == "0 layers on native kernels (the default device is not a CPU)"


def test_auto_without_the_extension_leaves_a_model_as_it_was(make_llama, monkeypatch):
    monkeypatch.setattr(_extension, "find", lambda: (None, "it was not built"))
    model = LanguageModel(make_llama())
    assert repr(model.acceleration) == "0 layers on native kernels (there is no native extension: it was not built)"


def test_true_switches_a_model_on_a_gpu_which_then_runs_as_before(make_llama, monkeypatch):
    plain = make_llama()
    logits = plain(IDS)
    model = LanguageModel(make_llama(), accelerate=True)
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=mx.DeviceType.gpu))
    assert len(model.acceleration) == NATIVE
    assert repr(model.acceleration) == f"0 layers on native kernels (the default device is not a CPU); {NATIVE} layers are switched"
    assert mx.array_equal(model(IDS), logits)


def test_the_repr_says_what_was_done(make_llama, native):
    module = make_llama()
    acceleration = accelerate(module)
    assert repr(acceleration) == f"{NATIVE} layers on native kernels ({_ext.isa()})"
    assert repr(accelerate(module)) == "0 layers on native kernels (all were switched before)"
    acceleration.undo()
    assert repr(acceleration) == "0 layers on native kernels (undone)"
    assert repr(accelerate(nn.Tanh())) == "0 layers on native kernels (the model has no layer for them)"


def test_a_model_that_is_switched_is_not_switched_again(make_llama, native):
    model = LanguageModel(make_llama())
    switched_once = classes(model.model)
    with accelerate(model) as second:
        assert len(second) == 0
    assert len(LanguageModel(model.model).acceleration) == 0
    assert classes(model.model) == switched_once
    assert len(model.acceleration) == NATIVE


def test_the_module_loads_no_mlx_lm(run_python):
    script = "import sys, metalens.models.acceleration as a; print(sorted({n.partition('.')[0] for n in sys.modules} & {'mlx_lm', 'transformers'}))"
    assert run_python(script).strip() == "[]"
    layer = "import mlx.core as mx, mlx.nn as nn; mx.set_default_device(mx.cpu); l = nn.Linear(8, 8); print(a.accelerate(l))"
    assert "mlx_lm" not in run_python(f"{script}; {layer}; print([n for n in sys.modules if n.startswith('mlx_lm')])").splitlines()[-1]


# ---------------------------------------------------------------- other modules see the same


def test_hidden_states_and_heads_are_found_in_an_accelerated_model(make_llama):
    for tied in (True, False):
        model = InterpretableModel(make_llama(tied=tied), accelerate=False)
        expected = model.source.capture(IDS)
        with accelerate(model):
            states = model.source.capture(IDS)
            unembed = model.unembed
        for ours, theirs in zip([*states.hidden, states.logits], [*expected.hidden, expected.logits], strict=True):
            np.testing.assert_allclose(oracle.wide(ours), oracle.wide(theirs), atol=1e-4)
        np.testing.assert_allclose(oracle.wide(unembed(states.hidden[-1])), oracle.wide(expected.logits), atol=1e-4)


def test_a_weight_is_read_from_layers_of_every_kind(rng):
    dense = nn.Linear(64, 33)
    quantized = nn.QuantizedLinear.from_linear(dense, 32, 6)
    x = oracle.random_array(rng, 2, 64)
    assert Weight.from_layer(dense).shape == Weight.from_layer(quantized).shape == (33, 64)
    expected = mx.dequantize(quantized.weight, quantized.scales, quantized.biases, 32, 6)
    np.testing.assert_allclose(oracle.product(x, Weight.from_layer(quantized)), oracle.wide(x) @ oracle.wide(expected).T, atol=1e-5)
    other = nn.QuantizedEmbedding(131, 64, 32, 4, mode="mxfp4")
    assert (Weight.from_layer(other).mode, Weight.from_layer(other).biases) == ("mxfp4", None)
