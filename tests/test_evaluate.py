import json
import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

import oracle
from metalens import InterpretableModel, TunedLens, evaluate

LENGTH = 8


def random_ids(rng, tokens):
    return rng.integers(0, 131, tokens).tolist()


def expected_scores(model, sequences, lens, bytes_per_token=1.0):
    """Per layer (the last entry is the model's own) {kl, ce, bits_per_byte, top1} in float64, over the given sequences of ids."""
    unembedding = oracle.Unembedding(model.unembed)
    rows = [[] for _ in range(len(model.source) + 1)]
    for ids in sequences:
        hidden = [oracle.wide(h)[0] for h in model.source.capture(mx.array([ids])).hidden]
        z_model = unembedding.logits(hidden[-1])
        if lens is None:
            logits = [unembedding.logits(h) for h in hidden]
        else:
            logits = [unembedding.translated(h, oracle.wide(t.weight), oracle.wide(t.bias)) for h, t in zip(hidden, lens.translators, strict=True)]
        for kept, z in zip(rows, [*logits, z_model], strict=True):
            nll = -np.take_along_axis(oracle.log_softmax(z[:-1]), np.array(ids[1:])[:, None], axis=-1)[:, 0]
            kept.append((oracle.kl(z_model, z), nll, z.argmax(-1) == z_model.argmax(-1)))
    result = []
    for kept in rows:
        kl, nll, top1 = (np.concatenate(parts).mean() for parts in zip(*kept, strict=True))
        result.append({"kl": kl, "ce": nll, "bits_per_byte": nll / math.log(2) / bytes_per_token, "top1": top1})
    return result


def assert_scores(ours, expected):
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert vars(a) == pytest.approx(b, abs=1e-5)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(
    ("tokens", "cuts"),
    [
        (16, [8, 8]),
        (23, [8, 8, 7]),
        (18, [8, 8, 2]),
        (17, [8, 9]),  # a tail of one token could predict nothing
        (5, [5]),
        (9, [9]),
        (2, [2]),
    ],
)
def test_numbers_against_float64(rng, quantised_model, tokens, cuts):
    ids, lens = random_ids(rng, tokens), oracle.random_lens(rng)
    result = evaluate(quantised_model, ids, lens, max_seq_len=LENGTH)
    sequences = [ids[end - cut : end] for cut, end in zip(cuts, np.cumsum(cuts), strict=True)]
    logit, tuned = (expected_scores(quantised_model, sequences, each) for each in (None, lens))
    assert_scores(result.logit, logit[:-1])
    assert_scores(result.tuned, tuned[:-1])
    assert_scores([result.model], logit[-1:])
    assert (result.tokens, result.bytes_per_token) == (tokens, 1.0)


def test_the_shortest_sequences(rng, tiny):
    # Two tokens each, and an odd token out.
    ids = random_ids(rng, 7)
    result = evaluate(tiny, ids, max_seq_len=2)
    assert_scores(result.logit, expected_scores(tiny, [ids[:2], ids[2:4], ids[4:]], None)[:-1])


def test_max_tokens_reads_only_the_start(rng, tiny):
    ids = random_ids(rng, 30)
    ours = evaluate(tiny, ids, max_seq_len=LENGTH, max_tokens=13)
    assert ours == evaluate(tiny, ids[:13], max_seq_len=LENGTH)
    assert ours.tokens == 13
    assert evaluate(tiny, ids, max_tokens=100).tokens == 30


def test_sequences_are_no_longer_than_the_model_s_context(rng, make_llama):
    model, ids = InterpretableModel(make_llama(context=LENGTH)), random_ids(rng, 20)
    assert evaluate(model, ids) == evaluate(model, ids, max_seq_len=LENGTH)
    assert evaluate(model, ids) != evaluate(model, ids, max_seq_len=20)


def test_an_untrained_lens_is_the_logit_lens(rng, tiny):
    result = evaluate(tiny, random_ids(rng, 20), TunedLens(3, 64), max_seq_len=LENGTH)
    assert_scores(result.tuned, [vars(s) for s in result.logit])


def test_the_last_layer_of_the_logit_lens_is_the_model(rng, quantised_model):
    result = evaluate(quantised_model, random_ids(rng, 20), max_seq_len=LENGTH)
    assert (result.model.kl, result.model.top1) == (0.0, 1.0)
    assert result.logit[-1].kl == pytest.approx(0, abs=1e-6)
    assert result.logit[-1].top1 == 1.0
    assert result.logit[-1].ce == pytest.approx(result.model.ce, abs=1e-6)
    assert result.tuned is None
    assert all(s.kl > 0.01 for s in result.logit[:-1])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_16_bit_models(rng, make_llama, dtype):
    model = InterpretableModel(make_llama(dtype=dtype))
    result = evaluate(model, random_ids(rng, 20), TunedLens(3, 64), max_seq_len=LENGTH)
    assert result.logit[-1].kl == pytest.approx(0, abs=1e-6)
    assert result.logit[-1].top1 == 1.0
    for tuned, logit in zip(result.tuned, result.logit, strict=True):
        assert tuned.ce == pytest.approx(logit.ce, abs=0.02)  # the lens works in float32, the model's own norm in 16 bits


def test_any_function_may_be_a_lens(rng, tiny):
    # A TunedLens is translated and normed in one operation, a function is called before the norm: the same to rounding.
    ids, lens = random_ids(rng, 20), oracle.random_lens(rng)
    ours, expected = evaluate(tiny, ids, lens.__call__), evaluate(tiny, ids, lens)
    for a, b in zip(ours.tuned, expected.tuned, strict=True):
        assert vars(a) == pytest.approx(vars(b), abs=1e-5)
    assert (ours.logit, ours.model) == (expected.logit, expected.model)


def test_ids_may_come_as_an_array(rng, tiny):
    ids = random_ids(rng, 20)
    assert evaluate(tiny, mx.array(ids)) == evaluate(tiny, ids)


class Spelling:
    """A tokenizer that spells every id as its letter, the even ones with two UTF-8 bytes."""

    def encode(self, text):
        return [ord(c) % 131 for c in text]

    def decode(self, ids):
        return "".join("é" if i % 2 == 0 else "e" for i in ids)


def test_bits_per_byte_count_utf8_bytes(rng, make_llama):
    model = InterpretableModel(make_llama(), Spelling())
    ids = [2, 4, 6, 1, 3, 8]
    result = evaluate(model, ids, max_seq_len=LENGTH)
    assert result.bytes_per_token == pytest.approx(10 / 6)
    assert_scores(result.logit, expected_scores(model, [ids], None, 10 / 6)[:-1])
    assert evaluate(model, "hello there").tokens == 11
    assert evaluate(model, ids, max_tokens=3).bytes_per_token == 2.0  # of the part that was read


def test_the_dictionary_is_the_documented_one(rng, tiny):
    ids = random_ids(rng, 12)
    result = evaluate(tiny, ids, oracle.random_lens(rng), max_seq_len=LENGTH)
    data = json.loads(json.dumps(result.to_dict()))
    assert data.keys() == {"tokens", "bytes_per_token", "model", "layers"}
    assert (data["tokens"], data["model"]) == (12, vars(result.model))
    assert [entry["layer"] for entry in data["layers"]] == [0, 1, 2]
    assert all(entry.keys() == {"layer", "logit", "tuned"} for entry in data["layers"])
    assert data["layers"][1]["tuned"] == vars(result.tuned[1])
    assert data["layers"][1]["logit"].keys() == {"kl", "ce", "bits_per_byte", "top1"}
    without = evaluate(tiny, ids).to_dict()
    assert all(entry.keys() == {"layer", "logit"} for entry in without["layers"])


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ([], {}, "no tokens"),
        ([5], {}, "single token"),
        ([1, 2, 3], {"max_seq_len": 1}, "at least 2"),
        ([1, 2, 3], {"max_seq_len": 0}, "at least 2"),
        ([1, 2, 3], {"max_tokens": 1}, "at least 2"),
        ([1, 2, 131], {}, "131"),
        ([1, -1, 3], {}, "-1"),
        ("text", {}, "[Tt]okenizer"),
        ([1, 2, 3], {"lens": TunedLens(2, 64)}, "another model"),
        ([1, 2, 3], {"lens": TunedLens(3, 32)}, "another model"),
    ],
)
def test_inputs_out_of_range(tiny, text, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny, text, **settings)


def test_what_is_not_a_lens(tiny):
    with pytest.raises(TypeError, match="lens"):
        evaluate(tiny, [1, 2, 3], SimpleNamespace())


def test_the_progress_bar_goes_to_stderr(rng, tiny, capfd):
    evaluate(tiny, random_ids(rng, 20), show_progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "evaluating" in err
    evaluate(tiny, random_ids(rng, 20))
    assert capfd.readouterr() == ("", "")
