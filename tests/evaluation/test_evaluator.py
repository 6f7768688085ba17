"""Scores of `evaluate` against float64, and its result."""

import json
import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel, TunedLens, evaluate
from metalens.evaluation import Evaluation, Scores
from support import oracle
from support.expected_scores import assert_scores, expected_scores, random_ids

LENGTH = 8
FIELDS = {"kl", "ce", "bits_per_byte", "top1", "entropy", "kl_bits_per_byte", "entropy_bits_per_byte"}


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
def test_numbers_against_float64(rng, quantized_model, tokens, cuts):
    ids, lens = random_ids(rng, tokens), oracle.random_lens(rng)
    result = evaluate(quantized_model, ids, lens, max_seq_len=LENGTH)
    sequences = [ids[end - cut : end] for cut, end in zip(cuts, np.cumsum(cuts), strict=True)]
    logit, tuned = (expected_scores(quantized_model, sequences, each) for each in (None, lens))
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


def test_the_last_layer_of_the_logit_lens_is_the_model(rng, quantized_model):
    result = evaluate(quantized_model, random_ids(rng, 20), max_seq_len=LENGTH)
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


# ------------------------------------------------------------------ the result


def test_the_dictionary_is_the_documented_one(rng, tiny):
    ids = random_ids(rng, 12)
    result = evaluate(tiny, ids, oracle.random_lens(rng), max_seq_len=LENGTH)
    data = json.loads(json.dumps(result.to_dict()))
    assert data.keys() == {"tokens", "bytes_per_token", "token_shift", "model", "layers", "sequences", "standard_errors"}
    assert (data["tokens"], data["model"]) == (12, vars(result.model))
    assert [entry["layer"] for entry in data["layers"]] == [0, 1, 2]
    assert all(entry.keys() == {"layer", "logit", "tuned"} for entry in data["layers"])
    assert data["layers"][1]["tuned"] == vars(result.tuned[1])
    assert data["layers"][1]["logit"].keys() == FIELDS
    without = evaluate(tiny, ids).to_dict()
    assert all(entry.keys() == {"layer", "logit"} for entry in without["layers"])


def test_the_text_form_is_a_short_table(rng, tiny):
    result = evaluate(tiny, random_ids(rng, 12), oracle.random_lens(rng), max_seq_len=LENGTH)
    title, heading, *rows = repr(result).splitlines()
    assert title == "Evaluation of 12 tokens: KL(model || lens) in nats per token, top-1 agreement with the model"
    assert heading.split() == ["layer", "logit", "KL", "top-1", "tuned", "KL", "top-1"]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "mean"]
    assert rows[1].split()[1:] == [f"{s[1].kl:.3f}" if kind else f"{100 * s[1].top1:.1f}%" for s in (result.logit, result.tuned) for kind in (1, 0)]
    assert float(rows[3].split()[3]) == pytest.approx(np.mean([s.kl for s in result.tuned]), abs=1e-3)
    alone = repr(evaluate(tiny, random_ids(rng, 12), max_seq_len=LENGTH))
    assert "tuned" not in alone
    assert repr(result) == str(result)


def test_the_text_form_of_many_layers_leaves_the_middle_out():
    scores = [Scores(float(i), 0.0, 0.0, 0.5, 0.0, 0.0, 0.0) for i in range(80)]
    rows = repr(Evaluation(2, 1.0, scores[0], scores, None)).splitlines()[2:]
    assert [row.split()[0] for row in rows] == [*map(str, range(12)), "...", *map(str, range(68, 80)), "mean"]
    assert rows[-1].split()[1] == "39.500"


def test_a_lens_may_be_given_by_its_path(rng, tiny, tmp_path):
    ids, lens = random_ids(rng, 12), oracle.random_lens(rng)
    lens.save(tmp_path / "lens")
    expected = evaluate(tiny, ids, lens)
    assert evaluate(tiny, ids, tmp_path / "lens") == evaluate(tiny, ids, str(tmp_path / "lens.npz")) == expected
    with pytest.raises(FileNotFoundError, match="No lens at"):
        evaluate(tiny, ids, "no such lens")


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
        ([[5], [6]], {}, "single token"),
        (np.zeros((0,), int), {}, "no tokens"),
        ([[], []], {}, "no tokens"),
        (np.ones((2, 2, 2), int), {}, r"\[B, T\]"),
        ([1, 2, 3], {"bytes_per_token": 0.0}, "bytes_per_token"),
        ([1, 2, 3], {"bytes_per_token": math.nan}, "bytes_per_token"),
        ([1, 2, 3], {"lens": TunedLens(2, 64)}, "another model"),
        ([1, 2, 3], {"lens": TunedLens(3, 32)}, "another model"),
    ],
)
def test_inputs_out_of_range(tiny, text, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny, text, **settings)


@pytest.mark.parametrize("text", [5, None, [None], [1.5, 2.5], mx.array([1.0, 2.0]).astype(mx.bfloat16), np.array(3), [["a", "b"]]], ids=repr)
def test_what_is_no_text(tiny, text):
    with pytest.raises(TypeError, match=r"Expected text|must be integers"):
        evaluate(tiny, text)


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
