import importlib
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metalens import InterpretableModel
from metalens.stream import StreamSource
from metalens.unembed import NO_NORM, Unembed
from mocks import DIM, VOCAB, MockModel, WordTokenizer, randomise, tiny_llama

IDS = mx.array([[3, 1, 4, 1, 5, 9, 2]])

LLAMA_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 70,
}
WITHOUT_RMS = {name: value for name, value in LLAMA_LIKE.items() if name != "rms_norm_eps"}
GRANITE = LLAMA_LIKE | {
    "logits_scaling": 6.0,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "max_position_embeddings": 64,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 10000.0,
}
GEMMA3 = LLAMA_LIKE | {"model_type": "gemma3_text", "head_dim": 8, "sliding_window_pattern": 2}
QWEN35 = LLAMA_LIKE | {
    "model_type": "qwen3_5_text",
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 3,
    "full_attention_interval": 2,
    "head_dim": 32,
}
MAMBA = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 64,
    "state_size": 4,
    "num_hidden_layers": 2,
    "conv_kernel": 3,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 2,
}
GPT_NEOX = {
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "layer_norm_eps": 1e-5,
    "vocab_size": 70,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.5,
}
GPT2 = {"n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "layer_norm_epsilon": 1e-5, "vocab_size": 70}
PHI = WITHOUT_RMS | {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}
STABLELM = LLAMA_LIKE | {"rope_theta": 10000.0, "use_qkv_bias": False, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5}
MINICPM = LLAMA_LIKE | {"dim_model_base": 8, "scale_depth": 1.4, "scale_emb": 3.0, "max_position_embeddings": 64}

# name of the module in mlx_lm.models, configuration, path of the head ("" for a tied one)
ARCHITECTURES = {
    "llama tied": ("llama", LLAMA_LIKE | {"tie_word_embeddings": True}, ""),
    "llama untied": ("llama", LLAMA_LIKE | {"tie_word_embeddings": False}, "lm_head"),
    "qwen2": ("qwen2", LLAMA_LIKE, ""),
    "gemma2, softcap": ("gemma2", LLAMA_LIKE | {"head_dim": 8, "final_logit_softcapping": 2.0}, ""),
    "gemma3_text": ("gemma3_text", GEMMA3, "lm_head"),
    "gemma3, wrapped": ("gemma3", {"model_type": "gemma3", "text_config": GEMMA3, "vocab_size": 70}, "language_model.lm_head"),
    "cohere, logit_scale": ("cohere", WITHOUT_RMS | {"logit_scale": 0.0625}, ""),
    "granite tied, logits_scaling": ("granite", GRANITE, ""),
    "granite untied, logits_scaling": ("granite", GRANITE | {"tie_word_embeddings": False}, "lm_head"),
    "phi, bias": ("phi", PHI, "lm_head"),
    "phi3": ("phi3", LLAMA_LIKE, "lm_head"),
    "gpt2": ("gpt2", GPT2, ""),
    "gpt_neox": ("gpt_neox", GPT_NEOX, "model.embed_out"),
    "olmo2": ("olmo2", LLAMA_LIKE, ""),
    "stablelm": ("stablelm", STABLELM, "lm_head"),
    "mamba": ("mamba", MAMBA, ""),
    "qwen3_5 untied": ("qwen3_5", {"model_type": "qwen3_5", "text_config": QWEN35}, "language_model.lm_head"),
}


def build(name, config):
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(1)
    # Norms, biases and all: a norm whose weight is 1 would hide that another one was taken.
    return randomise(module.Model(module.ModelArgs.from_dict({"model_type": name, **config})), seed=1, size=0.2)


def unembedded(model, **paths):
    """The Unembed, the model's last stream and its own logits; the Unembed must find everything without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unembed = Unembed.from_model(model, **paths)
    return unembed, StreamSource(model).capture(IDS)


def assert_reproduces(model, unembed, stream, tolerance=2e-5):
    unembed.check(StreamSource(model))
    own = np.array(stream.logits.astype(mx.float32))
    assert np.abs(own).max() > 1e-3
    found = unembed(stream.hidden[-1])
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), own, rtol=tolerance, atol=tolerance * np.abs(own).max())


@pytest.mark.parametrize(("name", "config", "head"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_models_own_logits(name, config, head):
    model = build(name, config)
    unembed, stream = unembedded(model)
    assert_reproduces(model, unembed, stream)
    assert unembed.paths["head"] == head
    assert unembed.tied == (head == "")
    assert (unembed.hidden_dim, unembed.vocab_size) == (32, 70)


def test_softcap_and_scales_are_read_from_the_configuration():
    found = {label: Unembed.from_model(build(*ARCHITECTURES[label][:2])).head for label in ARCHITECTURES if "," in label}
    assert found["gemma2, softcap"].softcap == 2.0
    assert found["cohere, logit_scale"].scale == 0.0625
    assert found["granite tied, logits_scaling"].scale == pytest.approx(1 / 6)
    assert found["granite untied, logits_scaling"].scale == pytest.approx(1 / 6)
    assert found["phi, bias"].bias is not None


def test_a_sanitised_gemma3_is_tied():
    model = build("gemma3_text", GEMMA3)
    model.sanitize({})  # what loading does when the file has no lm_head
    unembed, stream = unembedded(model)
    assert unembed.tied
    assert_reproduces(model, unembed, stream)


@pytest.mark.parametrize(
    ("name", "config"), [("minicpm", MINICPM), ("nanochat", LLAMA_LIKE)], ids=["minicpm scales its states", "nanochat hides its norm and softcap"]
)
def test_a_model_that_does_something_more_is_reproduced_or_refused(name, config):
    model = build(name, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unembed = Unembed.from_model(model)
    try:
        unembed.check(StreamSource(model))
    except ValueError as error:
        assert "Say where the model keeps them with norm_path" in str(error)  # noqa: PT017
    else:
        assert_reproduces(model, unembed, StreamSource(model).capture(IDS), tolerance=1e-2)


# ---------------------------------------------------------------- quantised and 16-bit heads


MODES = [("affine", 64, 4), ("affine", 32, 8), ("affine", 64, 3), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES, ids=[f"{mode}{bits} gs{size}" for mode, size, bits in MODES])
def test_quantised_heads(tied, mode, group_size, bits):
    model = tiny_llama(tied=tied)
    nn.quantize(model, group_size=group_size, bits=bits, mode=mode)
    unembed, stream = unembedded(model)
    assert unembed.head.weight.mode == mode
    assert unembed.tied == tied
    assert (unembed.hidden_dim, unembed.vocab_size) == (64, 96)
    assert_reproduces(model, unembed, stream)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_16_bit_models(tied, dtype):
    model = tiny_llama(tied=tied)
    model.set_dtype(dtype)
    unembed, stream = unembedded(model)
    assert stream.logits.dtype == dtype
    assert_reproduces(model, unembed, stream, tolerance=2e-2)


def test_a_head_with_a_bias():
    model = MockModel()
    unembed, stream = unembedded(model)
    assert unembed.paths == {"embedding": "embed_tokens", "norm": "norm", "head": "lm_head"}
    assert_reproduces(model, unembed, stream)


# ---------------------------------------------------------------- paths


class Unusual(nn.Module):
    """A model with names of its own, and a decoy that is called norm."""

    def __init__(self):
        super().__init__()
        inner = MockModel()
        self.table, self.layers, self.last_norm, self.projection, self.norm = (
            inner.embed_tokens,
            inner.layers,
            inner.norm,
            inner.lm_head,
            nn.RMSNorm(DIM),
        )

    def __call__(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return self.projection(self.last_norm(x))


def test_paths_that_the_caller_names():
    model = Unusual()
    paths = {"embedding_path": "table", "norm_path": "last_norm", "lm_head_path": "projection"}
    unembed, stream = unembedded(model, **paths)
    assert unembed.paths == {"embedding": "table", "norm": "last_norm", "head": "projection"}
    assert_reproduces(model, unembed, stream)
    own = InterpretableModel(model, WordTokenizer(), **paths)
    assert own.embedding_rows == VOCAB
    assert list(own.logit_lens("w1 w2")) == [0, 1, 2]


def test_the_wrong_norm_is_found_out():
    unembed = Unembed.from_model(Unusual(), lm_head_path="projection")
    assert unembed.paths["norm"] == "norm"
    with pytest.raises(ValueError, match=r"norm at 'norm' and the head at 'projection'.*off by up to.*norm_path, lm_head_path and embedding_path"):
        unembed.check(StreamSource(Unusual()))


@pytest.mark.parametrize("path", ["model.layers.0.input_layernorm", "model.layers.1.post_attention_layernorm"])
def test_a_norm_path_to_another_norm(path):
    model = InterpretableModel(tiny_llama(), norm_path=path)
    for use in (
        lambda: model.checked_unembed,
        lambda: model.logit_lens([1, 2]),
        lambda: model.train_tuned_lens([[1] * 20], 1, max_seq_len=10, verbose=False),
    ):
        with pytest.raises(ValueError, match=rf"norm at '{path}' and the head at 'lm_head'.*off by up to"):
            use()


def test_a_head_path_to_another_matrix():
    model = InterpretableModel(tiny_llama(), lm_head_path="model.layers.0.mlp.gate_proj")
    with pytest.raises(ValueError, match=r"head at 'model\.layers\.0\.mlp\.gate_proj' the logits are .*128\); the model's are .*96\).*lm_head_path"):
        model.logit_lens([1, 2])


def test_a_head_path_to_a_matrix_of_the_same_shape():
    model = InterpretableModel(tiny_llama(), lm_head_path="model.embed_tokens")
    with pytest.raises(ValueError, match=r"head at 'model\.embed_tokens'.*off by up to"):
        model.logit_lens([1, 2])


def test_a_head_path_to_a_matrix_of_another_width():
    model = InterpretableModel(tiny_llama(), lm_head_path="model.layers.0.mlp.down_proj")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj"):
        model.logit_lens([1, 2])


@pytest.mark.parametrize(("argument", "what"), [("embedding_path", "embedding"), ("norm_path", "final norm"), ("lm_head_path", "output head")])
def test_a_path_that_leads_nowhere_warns_and_falls_back(argument, what):
    with pytest.warns(UserWarning, match=f"No {what} at the given path 'model.nowhere'"):
        unembed = Unembed.from_model(tiny_llama(), **{argument: "model.nowhere"})
    assert unembed.paths == {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


# ---------------------------------------------------------------- parts that are missing


class Headless(nn.Module):
    """Blocks, and a projection that is not called by any usual name."""

    def __init__(self):
        super().__init__()
        inner = MockModel()
        self.table, self.layers, self.projection = inner.embed_tokens, inner.layers, inner.lm_head

    def __call__(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return self.projection(x)


def test_no_head_and_no_embedding():
    message = r"Cannot find output projection layer\. Model must have either 'lm_head' or weight-tied embeddings\. Tried paths: .*'model\.lm_head'"
    with pytest.raises(AttributeError, match=message):
        Unembed.from_model(Headless())
    with pytest.raises(AttributeError, match=message):
        InterpretableModel(Headless(), WordTokenizer()).logit_lens("w1")


def test_no_final_norm():
    model = Headless()
    with pytest.warns(UserWarning, match=r"Could not find the final norm; decoding without it\. Tried paths: .*'model\.norm'.*norm_path"):
        unembed = Unembed.from_model(model, lm_head_path="projection")
    assert unembed.norm is NO_NORM
    assert unembed.paths["norm"] == ""
    assert_reproduces(model, unembed, StreamSource(model).capture(IDS))


def test_a_head_alone_tells_the_number_of_ids():
    with pytest.warns(UserWarning, match="final norm"):
        assert InterpretableModel(Headless(), lm_head_path="projection").embedding_rows == VOCAB


# ---------------------------------------------------------------- damaged models


@pytest.mark.parametrize("where", ["lm_head", "norm", "embed_tokens"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights(where, value):
    model = MockModel()
    layer = getattr(model, where)
    layer.weight = layer.weight * value
    with pytest.raises(ValueError, match="weights are damaged"):
        Unembed.from_model(model).check(StreamSource(model))
    lens = InterpretableModel(model)
    with pytest.raises(ValueError, match="weights are damaged"):
        lens.logit_lens([1, 2])
    with pytest.raises(ValueError, match="weights are damaged"):
        lens.train_tuned_lens([[1] * 20], 1, max_seq_len=10, verbose=False)


def test_the_check_spares_models_that_are_right_at_every_size_of_logits():
    for factor in (1e-3, 1.0, 1e3):
        model = MockModel()
        model.lm_head.weight, model.lm_head.bias = model.lm_head.weight * factor, model.lm_head.bias * factor
        Unembed.from_model(model).check(StreamSource(model))


def test_a_vocabulary_smaller_than_the_checks_tokens():
    model = MockModel(vocab=3)
    Unembed.from_model(model).check(StreamSource(model))
