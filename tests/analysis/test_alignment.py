"""Aitchison geometry, stimulus-response alignment and gradient alignment, against float64 and models whose answer is known."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metalens import InterpretableModel
from metalens.analysis import alignment
from metalens.analysis.ablation import derangement
from metalens.analysis.aitchison import aitchison_inner, aitchison_similarity, change_similarity
from metalens.analysis.alignment import stimulus_response_alignment
from metalens.analysis.serializing import as_json
from metalens.analysis.update_gradients import cross_entropy_gradient, gradient_alignment
from support import oracle
from support.mocks import MockModel, float64_logits
from support.planted import planted


def inner64(a, b, w):
    """sum w log(a / g(a)) log(b / g(b)), as the definition is written."""
    p, q = (oracle.softmax(x) for x in (a, b))
    mean_p, mean_q = (np.exp(np.sum(w * np.log(x), axis=-1, keepdims=True)) for x in (p, q))
    return np.sum(w * np.log(p / mean_p) * np.log(q / mean_q), axis=-1)


@settings(max_examples=15)
@given(st.integers(0, 40), st.integers(2, 9))
def test_the_inner_product_against_its_definition(seed, size):
    rng = np.random.default_rng(seed)
    a, b, w = rng.standard_normal((3, 4, size)) * 3
    w = oracle.softmax(w)
    arrays = [mx.array(x.astype(np.float32)) for x in (a, b, w)]
    scale = np.sqrt(inner64(a, a, w) * inner64(b, b, w))
    np.testing.assert_allclose(np.array(aitchison_inner(*arrays)), inner64(a, b, w), atol=1e-5 * scale.max())
    np.testing.assert_allclose(np.array(aitchison_similarity(*arrays)), inner64(a, b, w) / scale, atol=1e-4)
    # Powering a composition and shifting logits keep its direction.
    np.testing.assert_allclose(np.array(aitchison_similarity(arrays[0], 2 * arrays[0] + 7, arrays[2])), 1, atol=1e-4)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("name", oracle.HEADS)
@pytest.mark.parametrize("mean_weights", [False, True])
def test_changes_against_float64(rng, name, mean_weights):
    head = oracle.make_head(rng, 67, 32, **oracle.HEADS[name])
    rows = [oracle.random_array(rng, 5, 32) for _ in range(4)]
    z = [oracle.head_logits(oracle.wide(n), head)[:, : head.tokens] for n in rows]
    w = oracle.softmax(z[2])
    w = (w + oracle.softmax(z[3])) / 2 if mean_weights else w
    s, r = z[1] - z[0], z[3] - z[2]
    expected = inner64(s, r, w) / np.sqrt(inner64(s, s, w) * inner64(r, r, w))
    found = np.array(change_similarity((rows[0], rows[1]), (rows[2], rows[3]), head, mean_weights=mean_weights))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    same = np.array(change_similarity((rows[0], rows[1]), (rows[0], rows[1]), head))
    np.testing.assert_allclose(same, 1, atol=1e-5)
    assert np.isnan(np.array(change_similarity((rows[0], rows[0]), (rows[2], rows[3]), head))).all()


def test_changes_of_other_shapes(rng):
    head = oracle.make_head(rng, 67, 32)
    a, b = oracle.random_array(rng, 5, 32), oracle.random_array(rng, 4, 32)
    with pytest.raises(ValueError, match="four arrays of rows of one shape"):
        change_similarity((a, a), (a, b), head)


# ------------------------------------------------------------------ stimulus and response


@pytest.mark.parametrize("cached", [True, False])
def test_alignment_against_blocks_by_hand(rng, make_llama, monkeypatch, cached):
    model = InterpretableModel(make_llama(layers=3, hidden=32, vocab=61, bits=None), accelerate=False)
    lens = oracle.random_lens(rng, 3, 32)
    if not cached:
        monkeypatch.setattr(type(model.source), "takes_cache", False)
    ids = rng.integers(0, 61, (5, 6))
    found = stimulus_response_alignment(model, ids, lens, seq_len=6, max_sequences=5, seed=2)
    order = derangement(5, 2)
    intact = model.source.capture(mx.array(ids), with_embedding=True)
    stream = [oracle.wide(h) for h in (intact.embedding, *intact.hidden)]
    unembedding = oracle.Unembedding(model.unembed)
    for each in found:
        moved = stream[each.layer + 1].copy()
        moved[:, -1] = stream[each.layer][:, -1] + (stream[each.layer + 1] - stream[each.layer])[order, -1]
        treated = model.source.capture(mx.array(ids), {each.layer: lambda h, moved=moved: mx.array(moved.astype(np.float32))})
        own, changed = (unembedding.logits(h[:, -1]) for h in (stream[-1], oracle.wide(treated.hidden[-1])))
        w = oracle.softmax(own)
        r = changed - own
        assert each.response.value == pytest.approx(oracle.kl(own, changed).mean(), rel=1e-3)
        translator = lens.translators[each.layer]
        for name, (weight, bias) in {
            "logit": (np.eye(32), np.zeros(32)),
            "tuned": (oracle.wide(translator.weight), oracle.wide(translator.bias)),
        }.items():
            before, after = (unembedding.translated(h[:, -1], weight, bias) for h in (stream[each.layer + 1], moved))
            s = after - before
            expected = inner64(s, r, w) / np.sqrt(inner64(s, s, w) * inner64(r, r, w))
            ours = each.lenses[name]
            assert ours.similarity.value == pytest.approx(expected.mean(), abs=1e-3)
            assert ours.similarity.low <= ours.similarity.value <= ours.similarity.high
            assert ours.stimulus.value == pytest.approx(oracle.kl(before, after).mean(), rel=1e-3)
            assert ours.samples == 5
    # The last block: the logit lens is the model.
    assert found[-1].lenses["logit"].similarity.value == pytest.approx(1, abs=1e-4)
    json.dumps(as_json(found), allow_nan=False)


def test_known_alignments(rng):
    """Later blocks that do nothing answer as the lens says; those that turn every direction round answer the other way."""
    eye, mixing = np.eye(4), rng.standard_normal((4, 4))
    for later, expected in ((0 * eye, 1), (-2 * eye, -1)):
        model = planted(rng.standard_normal((30, 4)), [mixing, later], rng.standard_normal((30, 4)))
        found = stimulus_response_alignment(model, rng.integers(0, 30, (8, 3)), layers=[0], seq_len=3, resamples=20)
        assert found[0].lenses["logit"].similarity.value == pytest.approx(expected, abs=1e-4)


def test_a_block_that_adds_nothing_has_no_alignment(rng):
    model = planted(rng.standard_normal((30, 4)), [np.zeros((4, 4)), np.eye(4)], rng.standard_normal((30, 4)))
    found = stimulus_response_alignment(model, rng.integers(0, 30, (4, 3)), layers=[0], seq_len=3, resamples=20)[0]
    assert found.lenses["logit"].samples == 0
    assert found.response.value == 0
    assert as_json(found)["lenses"]["logit"]["similarity"] == {"value": None, "low": None, "high": None}


def test_many_sequences_in_batches(rng, monkeypatch):
    monkeypatch.setattr(alignment, "BATCH", 3)
    model = planted(rng.standard_normal((30, 4)), [rng.standard_normal((4, 4))], rng.standard_normal((30, 4)))
    found = stimulus_response_alignment(model, rng.integers(0, 30, (8, 3)), seq_len=3, max_sequences=7)[0]
    assert found.lenses["logit"].samples == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 1}, "seq_len and max_sequences must be at least 2"),
        ({"max_sequences": 1}, "seq_len and max_sequences must be at least 2"),
        ({"seq_len": 9}, "text has 1 sequences of 9 tokens; at least 2 are needed"),
        ({"layers": [7]}, "no layer 7"),
    ],
)
def test_alignment_arguments_out_of_range(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        stimulus_response_alignment(tiny, list(range(12)), **{"seq_len": 4, **arguments})


# ------------------------------------------------------------------ gradients


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("name", oracle.HEADS)
def test_the_gradient_of_the_cross_entropy(rng, name):
    head = oracle.make_head(rng, 67, 32, **oracle.HEADS[name])
    n, labels = oracle.random_array(rng, 5, 32), rng.integers(0, head.tokens, 5)
    found = np.array(cross_entropy_gradient(n, mx.array(labels), head))
    rows = oracle.wide(n)

    def loss():
        return -oracle.log_softmax(oracle.head_logits(rows, head))[np.arange(5), labels].sum()

    for index in [(0, 0), (3, 31), (4, 11)]:
        assert found[index] == pytest.approx(oracle.central_difference(loss, rows, index), rel=1e-3, abs=1e-4)


def losses64(model, ids, start, x):
    """The cross-entropies of the next tokens, from the input x of block `start`, in float64."""
    shortened = MockModel(vocab=1, dim=1, layers=1)
    shortened.layers = model.layers[start:]
    shortened.norm, shortened.lm_head = model.norm, model.lm_head
    shortened.embed_tokens = type("Given", (), {"weight": x})
    logits = float64_logits(shortened, np.arange(len(ids)))[-1]
    return -oracle.log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]].sum()


def test_gradients_of_the_model_against_differences(rng):
    model = MockModel(vocab=20, dim=6)
    ids = rng.integers(0, 20, 5)
    found = gradient_alignment(InterpretableModel(model, accelerate=False), ids, of="model", resamples=20)
    x = oracle.wide(model.embed_tokens.weight)[ids]
    for layer, each in enumerate(found):
        gradient = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            gradient[index] = oracle.central_difference(lambda: losses64(model, ids, layer, x), x, index)  # noqa: B023
        following = oracle.wide(model.layers[layer](mx.array(x.astype(np.float32))[None]))[0]
        d, g = (following - x)[:-1], gradient[:-1]
        cosines = np.sum(d * g, axis=1) / np.linalg.norm(d, axis=1) / np.linalg.norm(g, axis=1)
        assert each.cosine.value == pytest.approx(cosines.mean(), abs=1e-4)
        assert each.negative.value == pytest.approx((cosines < 0).mean())
        assert each.sequence_cosine.value == pytest.approx(np.sum(d * g) / np.linalg.norm(d) / np.linalg.norm(g), abs=1e-4)
        x = following


class Step(nn.Module):
    """A block that adds a given vector at each position."""

    def __init__(self, step):
        super().__init__()
        self.step = mx.array(step.astype(np.float32))

    def __call__(self, x):
        return x + self.step[: x.shape[1]]


def test_a_block_that_descends(rng):
    """A block that adds a small step down the gradient of the lens's loss has a cosine of -1, one that goes up of +1."""
    head, words = rng.standard_normal((2, 30, 4))
    ids = rng.integers(0, 30, 12)
    for sign in (-1.0, 1.0):
        model = planted(words, [np.zeros((4, 4)), np.zeros((4, 4))], head)
        p = oracle.softmax(words[ids] @ head.T)
        gradient = p @ head - head[np.append(ids[1:], 0)]
        model.model.layers[1] = Step(sign * 0.01 * gradient)
        model = InterpretableModel(model.model, accelerate=False)
        found = gradient_alignment(model, ids, resamples=20)
        assert found[1].cosine.value == pytest.approx(sign, abs=1e-3)
        assert found[1].negative.value == (sign < 0)
        assert found[1].sequence_cosine.value == pytest.approx(sign, abs=1e-3)
        assert found[0].cosine.value == 0  # it adds nothing
        of_model = gradient_alignment(model, ids, of="model", resamples=20)
        assert of_model[1].cosine.value == pytest.approx(sign, abs=1e-3)  # nothing follows but the head


def test_a_tuned_lens_reads_the_input_of_a_block(rng, tiny):
    lens, ids = oracle.random_lens(rng), rng.integers(0, 131, 9)
    tuned, logit = gradient_alignment(tiny, ids, lens, resamples=20), gradient_alignment(tiny, ids, resamples=20)
    assert tuned[0].cosine.value == logit[0].cosine.value  # no translator of the embedding
    assert tuned[1].cosine.value != logit[1].cosine.value


def test_gradients_need_a_next_token(tiny):
    with pytest.raises(ValueError, match="No sequence of the text has a next token"):
        gradient_alignment(tiny, [[3], [4]])
