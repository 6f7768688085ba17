"""The check of norm and head against the model's own logits: what no module shows is noticed, and the caller can describe it."""

import mlx.core as mx
import mlx.nn as nn
import pytest

import zoo
from metalens import InterpretableModel
from metalens.models.unembed import LogitTransform, Unembed, UnembedError
from support.endings import WithoutBias, assert_reproduces, unembedded, with_end
from support.mocks import VOCAB, MockModel, randomize

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
