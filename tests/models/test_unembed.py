"""Norm and head are found by observing the model, and checked. Every architecture of mlx-lm is in test_zoo.py."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import zoo
from metalens import InterpretableModel
from metalens.compat.mlxterp.core.module_resolver import ModuleResolver
from metalens.models.capture import ResidualCapture
from metalens.models.head_check import logits_difference
from metalens.models.probe import Overrides, find_head_modules, probe_modules
from metalens.models.unembed import NO_NORM, LogitTransform, Unembed, UnembedError, norm_of
from metalens.ops import Norm
from metalens.utils.errors import InvalidTypeError, InvalidValueError
from support.endings import IDS, Args, Ending, assert_reproduces, unembedded, with_end
from support.mocks import DIM, VOCAB, Block, MockModel, WordTokenizer, randomize, tiny_llama

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


ENDS = {
    "softcap": (lambda self, x: 2.0 * mx.tanh(self.lm_head(self.norm(x)) / 2.0), {"final_logit_softcapping": 2.0}),
    "logit_scale": (lambda self, x: 0.3 * self.lm_head(self.norm(x)), {"logit_scale": 0.3}),
    "logits_scaling": (lambda self, x: self.lm_head(self.norm(x)) / 7, {"logits_scaling": 7}),
    "both": (lambda self, x: 1.5 * mx.tanh(0.3 * self.lm_head(self.norm(x)) / 1.5), {"logit_scale": 0.3, "final_logit_softcapping": 1.5}),
}


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


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("norm", "embedding at 'norm' is a RMSNorm, which has no matrix"),
        ("layers", "embedding at 'layers' is a list, which has no matrix"),
        ("other", f"embedding at 'other' is a Embedding, with {VOCAB + 9} rows, and the model calls 'embed_tokens', with {VOCAB} rows"),
    ],
)
def test_an_embedding_path_to_something_else(path, message):
    """The embedding says which ids the model knows: of another matrix, ids beyond the model's own would read other memory."""
    model = MockModel()
    model.other = nn.Embedding(VOCAB + 9, DIM)
    with pytest.raises(UnembedError, match=message):
        InterpretableModel(model, embedding_path=path).logit_lens([1, 2])


@pytest.mark.parametrize("transform", [5, 1.0, "none", lambda z: z])
def test_a_logit_transform_of_another_type(transform):
    for use in (lambda: InterpretableModel(MockModel(), logit_transform=transform), lambda: Unembed.from_model(MockModel(), None, transform)):
        with pytest.raises(InvalidTypeError, match="logit_transform must be a LogitTransform"):
            use()


@pytest.mark.parametrize("options", [{"scale": 0}, {"scale": float("inf")}, {"scale": "2"}, {"scale": True}, {"scale": None}])
def test_a_scale_that_is_none(options):
    with pytest.raises(InvalidValueError, match="scale of a LogitTransform must be a finite number other than 0"):
        LogitTransform(**options)


@pytest.mark.parametrize("softcap", [0, -1.0, float("inf"), float("nan"), "30"])
def test_a_softcap_that_is_none(softcap):
    with pytest.raises(InvalidValueError, match="softcap of a LogitTransform must be a finite number above 0, or None"):
        LogitTransform(softcap=softcap)


# ---------------------------------------------------------------- damaged models


@pytest.mark.parametrize("where", ["lm_head", "norm", "embed_tokens"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights(where, value):
    model = MockModel()
    layer = getattr(model, where)
    layer.weight = layer.weight * value
    with pytest.raises(ValueError, match=r"weights are damaged, or the model is float16 .* Convert it to bfloat16"):
        Unembed.from_model(model)
    lens = InterpretableModel(model)
    with pytest.raises(ValueError, match="weights are damaged"):
        lens.logit_lens([1, 2])
    with pytest.raises(ValueError, match="weights are damaged") as error:
        lens.train_tuned_lens([[1] * 20], 1, max_seq_len=10, verbose=False)
    assert "Could not find output projection" not in str(error.value)  # it was found


def test_a_bias_that_forbids_all_tokens_is_damage_and_one_that_forbids_some_is_none():
    model = MockModel()
    bias = np.array(model.lm_head.bias)
    bias[::2] = -np.inf
    model.lm_head.bias = mx.array(bias)
    lens = InterpretableModel(model)
    assert_reproduces_where_finite(model, lens.unembed)
    assert all(best % 2 for layer in lens.logit_lens([1, 2], top_k=3).values() for position in layer for best, _, _ in position)
    model.lm_head.bias = mx.full(bias.shape, -mx.inf)
    for use in (lambda: Unembed.from_model(model), lambda: lens.logit_lens([1, 2])):
        with pytest.raises(UnembedError, match="own logits are infinite on ordinary tokens: its weights are damaged"):
            use()


def assert_reproduces_where_finite(model, unembed):
    states = ResidualCapture(model).capture(IDS)
    own, found = np.array(states.logits), np.array(unembed(states.hidden[-1]))
    np.testing.assert_array_equal(np.isneginf(own), np.isneginf(found))
    np.testing.assert_allclose(found[np.isfinite(own)], own[np.isfinite(own)], rtol=2e-5, atol=2e-5)


def test_a_token_that_one_side_alone_forbids_is_a_difference():
    own = mx.array([[0.5, -mx.inf, 1.5]])
    assert logits_difference(own, own, exact=True) == (0.0, 0.5, True)
    for found in ([0.5, 3.0, 1.5], [0.5, -mx.inf, -mx.inf]):
        difference, _, is_rounding = logits_difference(mx.array([found]), own, exact=True)
        assert (difference, is_rounding) == (float("inf"), False)
    assert not logits_difference(mx.array([[0.5, -mx.inf, 1.6]]), own, exact=True)[2]


def test_the_check_accepts_right_models_at_every_size_of_logits():
    for factor in (1e-3, 1.0, 1e3):
        model = MockModel()
        model.lm_head.weight, model.lm_head.bias = model.lm_head.weight * factor, model.lm_head.bias * factor
        Unembed.from_model(model)


def test_a_vocabulary_smaller_than_the_checks_tokens():
    model = MockModel(vocab=3)
    Unembed.from_model(model)
