"""mlxterp.core.module_resolver, under mlxterp's own names."""

import mlx.nn as nn
import numpy as np
import pytest

from support.mocks import DIM, MockModel, WordTokenizer, tiny_llama


def test_parts_of_a_model_with_a_head_of_its_own(resolver):
    model = MockModel()
    found = resolver.ModuleResolver(model)
    assert found.get_embedding_layer() is model.embed_tokens
    assert found.get_embedding_path() == "embed_tokens"
    assert found.get_final_norm() is model.norm
    assert found.get_final_norm_path() == "norm"
    assert found.get_lm_head() is model.lm_head
    module, path, tied = found.get_output_projection()
    assert module is model.lm_head
    assert (path, tied) == ("lm_head", False)


def test_parts_of_a_tied_model(resolver):
    llama = tiny_llama(tied=True)
    found = resolver.ModuleResolver(llama)
    assert found.get_embedding_path() == "model.embed_tokens"
    assert found.get_final_norm_path() == "model.norm"
    module, path, tied = found.get_output_projection()
    assert module is llama.model.embed_tokens
    assert (path, tied) == ("model.embed_tokens", True)


def test_parts_that_the_caller_names(resolver):
    llama = tiny_llama()
    found = resolver.ModuleResolver(
        llama, embedding_path="model.embed_tokens", norm_path="model.layers.0.input_layernorm", lm_head_path="model.layers.0.mlp.up_proj"
    )
    assert found.get_embedding_layer() is llama.model.embed_tokens
    assert found.get_final_norm() is llama.model.layers[0].input_layernorm
    assert found.get_lm_head() is llama.model.layers[0].mlp.up_proj


def test_parts_at_a_wrong_path_fall_back_with_a_warning(resolver):
    model = MockModel()
    with pytest.warns(UserWarning, match="nowhere"):
        assert resolver.ModuleResolver(model, norm_path="nowhere").get_final_norm() is model.norm


def test_parts_that_are_missing(resolver):
    found = resolver.ModuleResolver(nn.Linear(3, 3))
    assert found.get_embedding_layer() is None
    assert found.get_final_norm() is None
    assert found.get_lm_head() is None
    assert found.get_output_projection()[0] is None


def test_parts_are_looked_up_again_after_clear_cache(resolver):
    model = MockModel()
    found = resolver.ModuleResolver(model)
    old, model.norm = found.get_final_norm(), nn.LayerNorm(DIM)
    found.clear_cache()
    assert old is not model.norm
    assert found.get_final_norm() is model.norm


def test_a_model_has_a_resolver(model):
    assert model._module_resolver.get_final_norm() is model.model.norm


@pytest.mark.parametrize(
    "keys",
    [
        ["model.model.layers.1", "model.model.layers.11", "model.model.layers.1.mlp", "__model_output__"],
        ["model.layers.11", "model.layers.1", "model.layers.1.mlp"],
        ["layers.1.mlp", "layers.11", "layers.1"],
        ["model.model.h.1", "model.model.h.11", "model.model.h.1.mlp"],
        ["model.h.1", "h.1.mlp", "model.h.10"],
        ["language_model.model.layers.1", "language_model.model.layers.12"],
    ],
)
def test_keys_of_layers(resolver, keys):
    activations = dict.fromkeys(keys)
    expected = next(key for key in keys if key.endswith((".1", "layers.1", "h.1")))
    assert resolver.find_layer_key_pattern(activations, 1) == expected
    assert resolver.find_layer_key_pattern(activations, 5) is None


def test_keys_of_components(resolver):
    activations = dict.fromkeys(
        ["model.model.layers.1", "model.model.layers.1.self_attn", "model.model.layers.1.self_attn.q_proj", "model.model.layers.11.mlp"]
    )
    assert resolver.find_layer_key_pattern(activations, 1, component="self_attn") == "model.model.layers.1.self_attn"
    assert resolver.find_layer_key_pattern(activations, 1, component="mlp") is None
    assert resolver.find_layer_key_pattern(activations, 11, "mlp") == "model.model.layers.11.mlp"


@pytest.mark.parametrize("network", [MockModel, tiny_llama])
def test_every_layer_of_a_trace_has_a_key(mlxterp, resolver, network):
    model = mlxterp.InterpretableModel(network(), WordTokenizer())
    with model.trace([1, 2, 3]) as trace:
        pass
    for i, layer in enumerate(model.layers):
        key = resolver.find_layer_key_pattern(trace.activations, i)
        np.testing.assert_array_equal(np.array(trace.activations[key]), np.array(layer.output.save()))


def test_normalized_keys_agree(resolver):
    keys = ("model.model.layers.3.mlp", "model.layers.3.mlp", "layers.3.mlp")
    assert {resolver.normalize_layer_key(key) for key in keys} == {"layers.3.mlp"}
