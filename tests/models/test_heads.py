"""Heads that are quantized, of 16 bits, or have an adapter: what is found of them gives the model's own logits."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

from metalens import InterpretableModel
from support.endings import assert_reproduces, unembedded
from support.mocks import MockModel, tiny_llama

MODES = [("affine", 64, 4), ("affine", 32, 8), ("affine", 64, 3), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES, ids=[f"{mode}{bits} gs{size}" for mode, size, bits in MODES])
def test_quantized_heads(tied, mode, group_size, bits):
    model = tiny_llama(tied=tied)
    nn.quantize(model, group_size=group_size, bits=bits, mode=mode)
    unembed, states = unembedded(model)
    assert unembed.head.weight.mode == mode
    assert unembed.tied == tied
    assert (unembed.hidden_dim, unembed.vocab_size) == (64, 96)
    assert_reproduces(model, unembed, states)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_16_bit_models(tied, dtype):
    model = tiny_llama(tied=tied)
    model.set_dtype(dtype)
    unembed, states = unembedded(model)
    assert states.logits.dtype == dtype
    assert_reproduces(model, unembed, states, tolerance=2e-2)


def test_a_head_with_a_bias():
    model = MockModel()
    unembed, states = unembedded(model)
    assert unembed.paths == {"embedding": "embed_tokens", "norm": "norm", "head": "lm_head"}
    assert_reproduces(model, unembed, states)


@pytest.mark.parametrize("head_bits", [2, 3, 4, 5, 6, 8])
def test_a_head_of_other_bits_than_the_blocks(head_bits):
    model = tiny_llama()
    nn.quantize(
        model,
        class_predicate=lambda path, m: (
            {"group_size": 32, "bits": head_bits if path == "lm_head" else 4} if "weight" in m and m["weight"].ndim == 2 else False
        ),
    )
    unembed, states = unembedded(model)
    assert (unembed.head.weight.bits, model.model.layers[0].mlp.up_proj.bits) == (head_bits, 4)
    assert_reproduces(model, unembed, states)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_unquantized_head_of_a_quantized_model(tied):
    model = tiny_llama(tied=tied)
    nn.quantize(model, class_predicate=lambda path, m: hasattr(m, "to_quantized") and "layers" in path)
    unembed, states = unembedded(model)
    assert unembed.head.weight.scales is None
    assert_reproduces(model, unembed, states)


@pytest.mark.parametrize("mode", ["mxfp4", "affine"])
def test_an_adapter_on_a_head_quantized_in_any_mode(rng, make_llama, mode):
    """Weights of mxfp4 unpack to bfloat16: a sum that was rounded to it looked like a wrong head."""
    model = make_llama(bits=4, mode=mode)
    model.lm_head = LoRALinear.from_base(model.lm_head, r=4, scale=3.0)
    model.lm_head.lora_b = mx.array(rng.standard_normal(model.lm_head.lora_b.shape).astype(np.float32) * 0.1)
    found = InterpretableModel(model).logit_lens([3, 1, 4], top_k=131)[2]
    for position, row in zip(found, np.array(model(mx.array([[3, 1, 4]])))[0], strict=True):
        np.testing.assert_allclose([z for _, z, _ in position], row[[i for i, _, _ in position]], atol=1e-3)


@pytest.mark.parametrize("adapter", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_head_with_an_adapter_is_merged(adapter, bits, rng):
    model = tiny_llama()
    if bits:
        nn.quantize(model, bits=bits)
    model.lm_head = adapter.from_base(model.lm_head, r=4, scale=3.0)
    model.lm_head.lora_b = mx.array(rng.standard_normal(model.lm_head.lora_b.shape).astype(np.float32) * 0.1)
    unembed, states = unembedded(model)
    assert unembed.paths["head"] == "lm_head"
    assert_reproduces(model, unembed, states)


def test_a_tied_head_with_an_adapter_is_merged(rng):
    model = tiny_llama(tied=True)
    model.model.embed_tokens = LoRAEmbedding.from_base(model.model.embed_tokens, r=4, scale=3.0)
    model.model.embed_tokens.lora_b = mx.array(rng.standard_normal(model.model.embed_tokens.lora_b.shape).astype(np.float32) * 0.1)
    unembed, states = unembedded(model)
    assert unembed.tied
    assert unembed.embedding_rows == 96
    assert_reproduces(model, unembed, states)
