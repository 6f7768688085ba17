"""Norm and head are found by observing the model, and checked. Every architecture of mlx-lm is in test_zoo.py."""

import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

import zoo
from metalens import InterpretableModel
from metalens.compat.mlxterp.core.module_resolver import ModuleResolver
from metalens.models.capture import ResidualCapture
from metalens.models.probe import Overrides, find_head_modules, probe_modules
from metalens.models.unembed import NO_NORM, LogitTransform, Unembed, UnembedError, norm_of
from metalens.ops import Norm
from support.mocks import DIM, VOCAB, Block, MockModel, WordTokenizer, randomize, tiny_llama

IDS = mx.array([[3, 1, 4, 1, 5, 9, 2]])


def unembedded(model, *options):
    """Return the Unembed, and the model's hidden states and logits. Nothing may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unembed = Unembed.from_model(model, *options)
    return unembed, ResidualCapture(model).capture(IDS)


def assert_reproduces(model, unembed, states, tolerance=2e-5):
    own = np.array(states.logits.astype(mx.float32))
    assert np.abs(own).max() > 1e-3
    found = unembed(states.hidden[-1])
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), own, rtol=tolerance, atol=tolerance * np.abs(own).max())


# ---------------------------------------------------------------- quantized and 16-bit heads


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


# ---------------------------------------------------------------- modules that are found


class Unusual(nn.Module):
    """A model with names of its own, and decoys under the usual names."""

    def __init__(self):
        super().__init__()
        inner = MockModel()
        self.table, self.layers, self.last_norm, self.projection = inner.embed_tokens, inner.layers, inner.norm, inner.lm_head
        self.norm, self.lm_head, self.embed_tokens = nn.RMSNorm(DIM), nn.Linear(DIM, VOCAB), nn.Embedding(VOCAB, DIM)

    def __call__(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return self.projection(self.last_norm(x))


def test_the_calls_of_the_model_count_and_not_its_names():
    model = Unusual()
    unembed, states = unembedded(model)
    assert unembed.paths == {"embedding": "table", "norm": "last_norm", "head": "projection"}
    assert not unembed.tied
    assert_reproduces(model, unembed, states)
    assert list(InterpretableModel(model, WordTokenizer()).logit_lens("w1 w2")) == [0, 1, 2]


def test_observing_leaves_nothing_behind():
    model = MockModel()
    before = [type(module) for _, module in model.named_modules()]
    logits = model(IDS)
    unembedded(model)
    assert [type(module) for _, module in model.named_modules()] == before
    assert mx.array_equal(model(IDS), logits)


def test_calls_are_in_order_and_outside_the_blocks():
    model = tiny_llama()
    calls = probe_modules(ResidualCapture(model), IDS)
    assert [call.path for call in calls.before] == ["model", "model.embed_tokens"]
    assert calls.before[0].encloses(calls.before[1])
    assert [(call.path, call.method) for call in calls.after] == [("model.norm", "__call__"), ("lm_head", "__call__")]
    norm, head = calls.after
    assert mx.array_equal(norm.input, calls.states.hidden[-1])
    assert mx.array_equal(norm.output, head.input)
    assert mx.array_equal(head.output, calls.states.logits)
    assert not norm.encloses(head)


def test_observing_a_model_that_fails_leaves_nothing_behind():
    class Failing(MockModel):
        def __call__(self, ids):
            super().__call__(ids)
            raise ZeroDivisionError

    model = Failing()
    before = [type(module) for _, module in model.named_modules()]
    with pytest.raises(ZeroDivisionError):
        Unembed.from_model(model)
    assert [type(module) for _, module in model.named_modules()] == before


class Ending(MockModel):
    """Has a method for everything after the last block."""

    def __call__(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.end(x)

    def end(self, x):
        return self.lm_head(self.norm(x))


def test_no_final_norm():
    class NoNorm(Ending):
        def end(self, x):
            return self.lm_head(x)

    model = NoNorm()
    unembed, states = unembedded(model)
    assert unembed.norm is NO_NORM
    assert unembed.paths["norm"] == ""
    assert_reproduces(model, unembed, states)


def test_a_table_that_is_multiplied_as_an_array():
    class Array(Ending):
        def end(self, x):
            return self.norm(x) @ self.embed_tokens.weight.T

    model = Array()
    unembed, states = unembedded(model)
    assert unembed.tied
    assert_reproduces(model, unembed, states)


def test_a_smaller_vocabulary_than_the_heads_rows():
    class Padded(Ending):
        def end(self, x):
            return super().end(x)[..., :61]

    model = Padded()
    unembed, states = unembedded(model)
    assert (unembed.vocab_size, unembed.head.tokens) == (VOCAB, 61)
    found = np.array(unembed(states.hidden[-1]))
    np.testing.assert_allclose(found[..., :61], np.array(states.logits), atol=1e-4)
    assert (found[..., 61:] == -np.inf).all()


class WithoutBias(Ending):
    def __init__(self):
        super().__init__()
        del self.lm_head["bias"]


class Args:
    def __init__(self, **values):
        self.__dict__.update(values)


ENDS = {
    "softcap": (lambda self, x: 2.0 * mx.tanh(self.lm_head(self.norm(x)) / 2.0), {"final_logit_softcapping": 2.0}),
    "logit_scale": (lambda self, x: 0.3 * self.lm_head(self.norm(x)), {"logit_scale": 0.3}),
    "logits_scaling": (lambda self, x: self.lm_head(self.norm(x)) / 7, {"logits_scaling": 7}),
    "both": (lambda self, x: 1.5 * mx.tanh(0.3 * self.lm_head(self.norm(x)) / 1.5), {"logit_scale": 0.3, "final_logit_softcapping": 1.5}),
}


def with_end(end, values, cls=Ending):
    model = type("Ended", (cls,), {"end": end})()
    model.args = Args(**values)
    return model


@pytest.mark.parametrize("holder", ["args", "text_config"])
@pytest.mark.parametrize("name", ENDS)
def test_transforms_are_found_with_the_configurations_numbers(name, holder):
    end, values = ENDS[name]
    model = with_end(end, values if holder == "args" else {"text_config": dict(values)})
    unembed, states = unembedded(model)
    assert_reproduces(model, unembed, states)
    assert (unembed.head.scale != 1.0) == ("scal" in name or name == "both")
    assert unembed.head.softcap == values.get("final_logit_softcapping")


@pytest.mark.parametrize("name", ENDS)
def test_numbers_of_the_configuration_that_the_model_does_not_use(name):
    model = MockModel()
    model.args = Args(**ENDS[name][1])
    unembed, states = unembedded(model)
    assert (unembed.head.scale, unembed.head.softcap) == (1.0, None)
    assert_reproduces(model, unembed, states)


# ---------------------------------------------------------------- changes that no module shows

MUTATIONS = {
    "a softcap": lambda self, x: 30.0 * mx.tanh(self.lm_head(self.norm(x)) / 30.0),
    "a scale": lambda self, x: 1.01 * self.lm_head(self.norm(x)),
    "a scale in place": lambda self, x: _in_place(self.lm_head(self.norm(x))),
    "a scale of the head's input": lambda self, x: self.lm_head(0.5 * self.norm(x)),
    "a shift of the hidden states": lambda self, x: self.lm_head(self.norm(x + 1.0)),
    "a bias": lambda self, x: self.lm_head(self.norm(x)) + mx.arange(VOCAB) / VOCAB,
    "an activation": lambda self, x: self.lm_head(mx.tanh(self.norm(x))),
    "a mixture of hidden states": lambda self, x: self.lm_head(self.norm(0.5 * x + mx.roll(x, 1, axis=1))),
    "ids that are forbidden": lambda self, x: mx.where(mx.arange(VOCAB) % 7 == 3, -mx.inf, self.lm_head(self.norm(x))),
    "the norm's bias": lambda self, x: self.lm_head(self.norm(x) + 0.1),
}


def _in_place(logits):
    logits *= 1.01
    return logits


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", MUTATIONS)
def test_changes_that_no_module_shows_are_detected(name, dtype):
    model = with_end(MUTATIONS[name], {})
    model.set_dtype(dtype)
    with pytest.raises(
        UnembedError, match=r"do not follow from its last block's output with the norm at 'norm' and the head at 'lm_head'.*logit_transform"
    ):
        Unembed.from_model(model)


@pytest.mark.parametrize("label", ["llama", "gemma2", "cohere", "granite", "phi", "recurrent_gemma", "mamba", "mixtral", "gemma4", "rwkv7"])
@pytest.mark.parametrize("what", ["a softcap", "a scale", "a bias"])
def test_changes_of_real_models_are_detected(label, what):
    model = zoo.build(label)
    original = type(model)
    change = {
        "a softcap": lambda z: 30 * mx.tanh(z / 30),
        "a scale": lambda z: 1.01 * z,
        "a bias": lambda z: z + mx.arange(z.shape[-1]) / z.shape[-1],
    }[what]
    model.__class__ = type(original.__name__, (original,), {"__call__": lambda self, *a, **k: change(original.__call__(self, *a, **k))})
    with pytest.raises(UnembedError, match="do not follow"):
        Unembed.from_model(model)


@pytest.mark.parametrize("label", ["llama", "gemma", "phi", "nemotron"])
def test_a_swapped_norm_is_followed(label):
    """Another norm in the model's own place is the model's norm."""
    model = zoo.build(label)
    inner = model.model
    name = "final_layernorm" if label == "phi" else "norm"
    inner[name] = randomize(nn.LayerNorm(getattr(inner, name).weight.size))
    unembed, states = unembedded(model)
    assert unembed.norm.kind == "layer"
    assert_reproduces(model, unembed, states)


def test_the_error_says_where_the_difference_begins():
    for mutation, words in (
        ("a scale", r"the logits are not the output of 'lm_head', but 1\.01 times that"),
        ("a scale of the head's input", r"the input of 'lm_head' is not the output of 'norm', but 0\.5 times that"),
        ("a shift of the hidden states", r"the input of 'norm' is not the last block's output"),
        ("a softcap", r"the logits are not the output of 'lm_head'\."),
    ):
        with pytest.raises(UnembedError, match=words):
            Unembed.from_model(with_end(MUTATIONS[mutation], {}))


def test_the_caller_describes_the_output_layers():
    model = with_end(MUTATIONS["a scale"], {})
    unembed, states = unembedded(model, None, LogitTransform(scale=1.01))
    assert_reproduces(model, unembed, states)
    bare = with_end(lambda self, x: self.lm_head(0.5 * self.norm(x)), {}, WithoutBias)
    unembed, states = unembedded(bare, None, LogitTransform(scale=0.5))
    assert_reproduces(bare, unembed, states)
    lens = InterpretableModel(with_end(MUTATIONS["a softcap"], {}), logit_transform=LogitTransform(softcap=30.0))
    assert list(lens.logit_lens([1, 2])) == [0, 1, 2]
    model = with_end(MUTATIONS["the norm's bias"], {})
    shifted = InterpretableModel(model, norm=lambda h: model.norm(h) + 0.1)
    assert shifted.unembed.paths["norm"] == "(given)"
    assert list(shifted.logit_lens([1, 2])) == [0, 1, 2]
    given = InterpretableModel(MockModel(), head=MockModel().lm_head)
    assert given.unembed.paths["head"] == "(given)"
    wrong = MockModel().lm_head
    wrong.weight = wrong.weight[::-1]
    with pytest.raises(UnembedError, match="do not follow"):
        _ = InterpretableModel(MockModel(), head=wrong).unembed


def test_a_wrong_description_is_refused():
    for transform in (LogitTransform(scale=1.01), LogitTransform(softcap=30.0)):
        with pytest.raises(UnembedError, match="do not follow"):
            Unembed.from_model(MockModel(), None, transform)


# ---------------------------------------------------------------- norms


@pytest.mark.parametrize("label", ["gemma", "gemma2", "gemma3_text", "plamo2", "plamo3", "nemotron", "recurrent_gemma", "gear"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_norms_of_other_classes_are_recognized_by_their_results(label, dtype):
    """An unknown norm runs as the model's own function, which no kernel fuses."""
    model = zoo.build(label)
    model.set_dtype(dtype)
    unembed, states = unembedded(model)
    assert unembed.norm.kind == ("layer" if label == "nemotron" else "rms")
    h = states.hidden[-1].astype(mx.float32)
    by_kind = mx.fast.layer_norm if label == "nemotron" else mx.fast.rms_norm
    parts = (unembed.norm.weight, unembed.norm.bias) if label == "nemotron" else (unembed.norm.weight,)
    assert mx.array_equal(by_kind(h, *parts, unembed.norm.eps), unembed.norm(h))


def test_a_norm_that_only_looks_like_one_is_a_function():
    class Almost(nn.RMSNorm):
        def __call__(self, x):
            return super().__call__(x) + 1e-3

    assert norm_of(randomize(Almost(DIM))).kind is None
    assert norm_of(mx.tanh) == Norm(mx.tanh)


# ---------------------------------------------------------------- paths


def test_paths_that_the_caller_names():
    model = Unusual()
    unembed, states = unembedded(model, Overrides("table", "last_norm", "projection"))
    assert unembed.paths == {"embedding": "table", "norm": "last_norm", "head": "projection"}
    assert_reproduces(model, unembed, states)
    own = InterpretableModel(model, WordTokenizer(), embedding_path="table", norm_path="last_norm", lm_head_path="projection")
    assert own.embedding_rows == VOCAB


@pytest.mark.parametrize("path", ["model.layers.0.input_layernorm", "model.layers.1.post_attention_layernorm"])
def test_a_norm_path_to_another_norm(path):
    model = InterpretableModel(tiny_llama(), norm_path=path)
    for use in (
        lambda: model.unembed,
        lambda: model.logit_lens([1, 2]),
        lambda: model.train_tuned_lens([[1] * 20], 1, max_seq_len=10, verbose=False),
    ):
        with pytest.raises(ValueError, match=rf"norm at '{path}' and the head at 'lm_head'.*off by up to"):
            use()


def test_a_head_path_to_another_matrix():
    model = InterpretableModel(tiny_llama(), lm_head_path="model.layers.0.mlp.gate_proj")
    with pytest.raises(
        ValueError, match=r"head at 'model\.layers\.0\.mlp\.gate_proj' the logits are .*128\); the model's are .*96\).*head= or logit_transform="
    ):
        model.logit_lens([1, 2])


def test_a_head_path_to_a_matrix_of_the_same_shape():
    model = InterpretableModel(tiny_llama(), lm_head_path="model.embed_tokens")
    with pytest.raises(ValueError, match=r"head at 'model\.embed_tokens'.*off by up to"):
        model.logit_lens([1, 2])


def test_a_head_path_to_a_matrix_of_another_width():
    model = InterpretableModel(tiny_llama(), lm_head_path="model.layers.0.mlp.down_proj")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj"):
        model.logit_lens([1, 2])


@pytest.mark.parametrize(("argument", "what"), [("embedding", "embedding"), ("norm", "final norm"), ("head", "output head")])
def test_a_path_that_leads_nowhere_warns_and_falls_back(argument, what):
    with pytest.warns(UserWarning, match=f"No {what} at the given path 'model.nowhere'"):
        unembed = Unembed.from_model(tiny_llama(), Overrides(**{argument: "model.nowhere"}))
    assert unembed.paths == {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


@pytest.mark.parametrize(
    "find",
    [
        lambda: Unembed.from_model(tiny_llama(), Overrides(norm="model.nowhere")),
        lambda: find_head_modules(ResidualCapture(tiny_llama()), Overrides(norm="model.nowhere")),
        lambda: InterpretableModel(tiny_llama(), norm_path="model.nowhere").unembed,
        lambda: InterpretableModel(tiny_llama(), norm_path="model.nowhere").logit_lens([1, 2]),
        lambda: ModuleResolver(tiny_llama(), norm_path="model.nowhere").get_final_norm(),
    ],
    ids=["from_model", "find_head_modules", "unembed", "logit_lens", "ModuleResolver"],
)
def test_the_warning_points_to_the_users_line(find):
    with pytest.warns(UserWarning, match="No final norm at the given path") as caught:
        find()
    assert [warning.filename for warning in caught] == [__file__]


# ---------------------------------------------------------------- missing modules


class Headless(nn.Module):
    """Uses an array as embedding and head, so it calls neither."""

    def __init__(self):
        super().__init__()
        self.table, self.layers = mx.random.normal((VOCAB, DIM), key=mx.random.key(0)), [Block(DIM)]

    def __call__(self, ids):
        x = self.table[ids]
        for layer in self.layers:
            x = layer(x)
        return x @ self.table.T


def test_no_head_and_no_embedding():
    message = r"Cannot find output projection layer: after its last block the model calls no linear layer.*It calls no module at all"
    with pytest.raises(AttributeError, match=message):
        Unembed.from_model(Headless())
    with pytest.raises(ValueError, match=message):
        InterpretableModel(Headless(), WordTokenizer()).logit_lens("w1")


def test_the_number_of_ids_comes_from_the_head_without_an_embedding():
    head = nn.Linear(DIM, VOCAB, bias=False)
    model = Headless()
    head.weight = model.table
    assert InterpretableModel(model, head=head).embedding_rows == VOCAB


# ---------------------------------------------------------------- damaged models


@pytest.mark.parametrize("where", ["lm_head", "norm", "embed_tokens"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights(where, value):
    model = MockModel()
    layer = getattr(model, where)
    layer.weight = layer.weight * value
    with pytest.raises(ValueError, match="weights are damaged"):
        Unembed.from_model(model)
    lens = InterpretableModel(model)
    with pytest.raises(ValueError, match="weights are damaged"):
        lens.logit_lens([1, 2])
    with pytest.raises(ValueError, match="weights are damaged"):
        lens.train_tuned_lens([[1] * 20], 1, max_seq_len=10, verbose=False)


def test_the_check_accepts_right_models_at_every_size_of_logits():
    for factor in (1e-3, 1.0, 1e3):
        model = MockModel()
        model.lm_head.weight, model.lm_head.bias = model.lm_head.weight * factor, model.lm_head.bias * factor
        Unembed.from_model(model)


def test_a_vocabulary_smaller_than_the_checks_tokens():
    model = MockModel(vocab=3)
    Unembed.from_model(model)
