"""The facts of a model, read from its configuration and the headers of its files."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from metalens import InterpretableModel
from metalens.models.bundled import MODEL
from metalens.models.facts import KNOWN_MODELS, dimensions_of, facts_of


def nbytes(model):
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def test_the_model_is_read_from_headers():
    facts = facts_of(str(MODEL))
    model = InterpretableModel(str(MODEL))
    assert facts.exact
    assert facts.weight_bytes == nbytes(model.model)
    assert (facts.dimensions.num_layers, facts.dimensions.hidden_size, facts.dimensions.vocab_size) == (8, 256, 6000)
    assert facts.dimensions.block_params == 8 * 256 * (2 * 256 + 2 * 128 + 3 * 704)
    assert (facts.context_length, facts.intermediate_size) == (256, 704)


def test_without_weights_the_model_is_estimated(tmp_path):
    (tmp_path / "config.json").write_text((MODEL / "config.json").read_text())
    known, facts = facts_of(str(MODEL)), facts_of(str(tmp_path))
    assert not facts.exact
    assert facts.dimensions == known.dimensions
    assert facts.weight_bytes == pytest.approx(known.weight_bytes, rel=0.25)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 123}}))
    assert facts_of(str(tmp_path)).weight_bytes == 123


def test_of_experts_the_active_ones_count(tmp_path):
    config = json.loads((MODEL / "config.json").read_text())
    config |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "quantization": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"), {"model.embed_tokens.weight": mx.zeros((60, 4)), "model.layers.0.mlp.up.weight": mx.zeros((8, 3, 4))}
    )
    facts = facts_of(str(tmp_path))
    assert facts.dimensions.block_params == 2 * 3 * 4
    assert facts.intermediate_size == 2 * 96


def test_a_damaged_header_is_named(tmp_path):
    (tmp_path / "config.json").write_text((MODEL / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"\x05\x00\x00\x00\x00\x00\x00\x00hello")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        facts_of(str(tmp_path))


def test_dimensions_of_the_presets():
    d = KNOWN_MODELS["Llama-3.1-8B-4bit"]
    assert (d.num_layers, d.hidden_size, d.vocab_size) == (32, 4096, 128256)
    assert d.block_params == pytest.approx(6.98e9, rel=0.01)  # 8.03 billion less embedding and head


def test_dimensions_of_a_folder(tmp_path):
    d = dimensions_of(str(MODEL))
    assert (d.num_layers, d.vocab_size, d.bits) == (8, json.loads((MODEL / "config.json").read_text())["vocab_size"], 4)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 2, "hidden_size": 64}')
    with pytest.raises(ValueError, match="does not say 'vocab_size'"):
        dimensions_of(str(tmp_path))
    with pytest.raises(ValueError, match="no folder with a config.json and none of Llama"):
        dimensions_of("nowhere")
    nested = {"text_config": {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 100, "num_attention_heads": 4, "num_key_value_heads": 2}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert (dimensions_of(str(tmp_path)).num_layers, dimensions_of(str(tmp_path)).bits) == (2, 16)


def test_a_configuration_of_gpt_2_s_kind(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 131}))
    facts = facts_of(str(tmp_path))
    assert (facts.dimensions.num_layers, facts.dimensions.hidden_size, facts.intermediate_size, facts.context_length) == (3, 64, 256, 128)
