"""Readings inside the blocks, against blocks computed by hand and float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gemma3_text, gpt2, gpt_neox

from metalens import InterpretableModel, TunedLens
from metalens.models.capture import ResidualStreamError
from metalens.models.sublayers import SUBLAYERS, capture_sublayers
from support import oracle
from support.mocks import MockModel, randomize, tiny_llama

IDS = [3, 1, 4, 1, 5, 9]


def same(a, b, tolerance=1e-4):
    np.testing.assert_allclose(np.array(a), np.array(b), rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def model():
    return InterpretableModel(tiny_llama(layers=3))


def test_a_llama_s_block(model):
    states = capture_sublayers(model.source, model.ids(IDS))
    h = model.model.model.embed_tokens(mx.array([IDS]))
    mask = nn.MultiHeadAttention.create_additive_causal_mask(len(IDS))
    for i, block in enumerate(model.model.model.layers):
        attention = block.self_attn(block.input_layernorm(h), mask)
        same(states.attention[i], attention)
        same(states.middle[i], h + attention)
        same(states.mlp[i], block.mlp(block.post_attention_layernorm(h + attention)))
        h = h + attention + states.mlp[i]
        same(states.hidden[i], h)


def gemma():
    args = gemma3_text.ModelArgs(
        model_type="gemma3_text",
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=50,
        sliding_window=4,
        sliding_window_pattern=2,
    )
    return gemma3_text.Model(args)


def neox():
    args = gpt_neox.ModelArgs(
        model_type="gpt_neox",
        max_position_embeddings=32,
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        layer_norm_eps=1e-5,
        vocab_size=50,
        rotary_emb_base=10000,
        rotary_pct=0.25,
    )
    return gpt_neox.Model(args)


def gpt():
    return gpt2.Model(
        gpt2.ModelArgs(model_type="gpt2", n_ctx=16, n_embd=32, n_head=2, n_layer=2, n_positions=16, layer_norm_epsilon=1e-5, vocab_size=50)
    )


@pytest.mark.parametrize("make", [gemma, neox, gpt])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_the_parts_of_other_blocks_add_up(make, dtype):
    """Gemma norms what it adds, GPT-NeoX adds both parts to one input, GPT-2 has other names."""
    module = randomize(make(), size=0.1)
    module.set_dtype(dtype)
    model = InterpretableModel(module)
    states = capture_sublayers(model.source, model.ids(IDS))
    embedded = model.source.capture(model.ids(IDS), with_embedding=True).embedding
    tolerance = 1e-4 if dtype == mx.float32 else 0.1
    for i, before in enumerate([embedded, *states.hidden[:-1]]):
        wide = [x.astype(mx.float32) for x in (before, states.attention[i], states.mlp[i], states.hidden[i], states.middle[i])]
        same(wide[0] + wide[1] + wide[2], wide[3], tolerance)
        same(wide[0] + wide[1], wide[4], tolerance)
        if make is gemma and dtype == mx.float32:
            block = model.model.model.layers[i]
            same(states.mlp[i], block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(states.middle[i]))))


def test_a_block_of_one_part_is_refused():
    model = InterpretableModel(MockModel())
    with pytest.raises(ResidualStreamError, match="Block 0 does not add the outputs of its attention"):
        model.read_sublayers(IDS)


@pytest.mark.parametrize("sublayer", SUBLAYERS)
def test_every_sublayer_through_a_lens(model, rng, sublayer):
    lens = oracle.random_lens(rng)
    lens.embedding_translator = TunedLens(1, 64).translators[0]
    lens.embedding_translator.bias = oracle.random_array(rng, 64)
    t = model.read_sublayers(IDS, sublayer, lens, top_k=2)
    assert (t.layers, t.lens, t.untranslated) == ((0, 1, 2), f"tuned lens of {sublayer}", ())
    states, unembedding = capture_sublayers(model.source, model.ids(IDS)), oracle.Unembedding(model.unembed)
    z_model = unembedding.logits(oracle.wide(states.hidden[-1])[0])
    for block, layer in enumerate(["embedding", 0, 1]):
        weight, bias = (oracle.wide(part) for part in lens.dense(layer))
        z = unembedding.translated(oracle.wide(states.of(sublayer)[block])[0], weight, bias)
        np.testing.assert_allclose(t.entropy[block], oracle.entropy(z), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(t.kl[block], oracle.kl(z_model, z), rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(t.top_ids[block, :, 0], z.argmax(-1))


def test_options_and_several_texts(model, rng):
    lens = oracle.random_lens(rng)
    whole = model.read_sublayers(IDS, "mlp", lens)
    assert whole.untranslated == (0,)  # the embedding has no translator
    part = model.read_sublayers(IDS, "mlp", lens, layers=[2, 1], position=-1)
    np.testing.assert_allclose(part.entropy, whole.entropy[[2, 1], -1:], rtol=1e-4)
    several = model.read_sublayers([IDS, IDS[:3]], "attention")
    assert [len(t) for t in several] == [6, 3]
    assert several[0].lens == "logit lens of attention"


def test_what_cannot_be_read(model):
    with pytest.raises(ValueError, match="sublayer must be one of attention, middle, mlp"):
        model.read_sublayers(IDS, "residual")
    with pytest.raises(ValueError, match="The embedding has no sublayers"):
        model.read_sublayers(IDS, embedding=True)
    with pytest.raises(TypeError, match="has no option nonsense"):
        model.read_sublayers(IDS, nonsense=1)
