import json
import math
from itertools import chain, pairwise
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens import InterpretableModel, TunedLens, evaluate
from metalens.evaluation import Evaluation, Scores
from metalens.evaluation.text import ByteCount, Sequences
from metalens.training.data import Corpus
from support import oracle

LENGTH = 8
FIELDS = {"kl", "ce", "bits_per_byte", "top1", "entropy", "kl_bits_per_byte", "entropy_bits_per_byte"}


def random_ids(rng, tokens):
    return rng.integers(0, 131, tokens).tolist()


def expected_scores(model, sequences, lens, bytes_per_token=1.0):
    """Per layer (the last entry is the model's own) the fields of Scores in float64, over the given sequences of ids."""
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
            nll = -np.take_along_axis(oracle.log_softmax(z[:-1]), np.array(ids[1:], int)[:, None], axis=-1)[:, 0]
            kept.append((oracle.kl(z_model, z), nll, z.argmax(-1) == z_model.argmax(-1), oracle.entropy(z)))
    result = []
    for kept in rows:
        kl, ce, top1, entropy = (np.concatenate(parts).mean() for parts in zip(*kept, strict=True))
        nats = {"kl": kl, "ce": ce, "entropy": entropy}
        bpb = {"bits_per_byte" if name == "ce" else f"{name}_bits_per_byte": x / math.log(2) / bytes_per_token for name, x in nats.items()}
        result.append(nats | bpb | {"top1": top1})
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
    given = evaluate(model, ids, max_seq_len=LENGTH, bytes_per_token=4.5)
    assert given.bytes_per_token == 4.5
    assert_scores(given.logit, expected_scores(model, [ids], None, 4.5)[:-1])


def test_tokens_that_decode_to_nothing(make_llama):
    model = InterpretableModel(make_llama(), SimpleNamespace(decode=lambda ids: ""))
    with pytest.raises(ValueError, match="Pass bytes_per_token"):
        evaluate(model, [1, 2, 3])
    assert evaluate(model, [1, 2, 3], bytes_per_token=2.0).bytes_per_token == 2.0


# ------------------------------------------------------------------ documents


class Documents:
    """Documents as in a memory-mapped file: unsigned 16-bit ids, fetched one by one."""

    def __init__(self, documents):
        self.documents = [np.array(d, np.uint16) for d in documents]
        self.fetched = 0

    def __iter__(self):
        for document in self.documents:
            self.fetched += 1
            yield document


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("form", [list, Documents, iter, lambda documents: [mx.array(d, mx.int32) for d in documents]])
def test_documents_are_not_joined(rng, tiny, form):
    sizes = (11, 1, 8, 9, 2, 0, 17)
    documents = [random_ids(rng, size) for size in sizes]
    cuts = [documents[0][:8], documents[0][8:], documents[1], documents[2], documents[3], documents[4], documents[6][:8], documents[6][8:]]
    lens = oracle.random_lens(rng)
    result = evaluate(tiny, form(documents), lens, max_seq_len=LENGTH)
    assert result.tokens == sum(sizes)
    assert_scores(result.tuned, expected_scores(tiny, cuts, lens)[:-1])
    assert_scores([result.model], expected_scores(tiny, cuts, None)[-1:])


def test_rows_of_an_array_are_documents(rng, tiny):
    ids = rng.integers(0, 131, (3, 8))
    expected = evaluate(tiny, ids.tolist())
    assert evaluate(tiny, ids) == expected
    assert evaluate(tiny, mx.array(ids)) == expected
    assert evaluate(tiny, (mx.array(row)[None] for row in ids)) == expected  # as sequences for training come


@given(
    sizes=st.lists(st.integers(0, 20), max_size=6),
    length=st.integers(3, 9),
    max_tokens=st.none() | st.integers(2, 40),
    form=st.sampled_from(["iterable", "packed", "eos"]),
    prefix=st.sampled_from([(), (900,), (900, 901)]),
)
def test_sequences_cut_documents_and_lose_nothing(sizes, length, max_tokens, form, prefix):
    model = SimpleNamespace(context=None, prefix=(), check_ids=lambda ids: ids, tokenizer=None)
    bounds = np.cumsum([0, *sizes])
    ids = np.arange(bounds[-1])
    text = stored(ids, bounds, form, prefix) if form != "iterable" else [ids[start:end] for start, end in pairwise(bounds)]
    prefix = list(prefix if form != "iterable" else ())
    sequences = Sequences(model, text, length, max_tokens)
    found = [sequence.tolist() for sequence in sequences]
    assert all(sequence[: len(prefix)] == prefix for sequence in found)
    texts = [sequence[len(prefix) :] for sequence in found]
    read = list(chain(*texts))
    assert read == list(range(bounds[-1]))[:max_tokens]
    assert sequences.tokens == len(read)
    owner = np.repeat(range(len(sizes)), sizes)
    starts = {0, int(bounds[-1])} if form == "eos" else set(bounds.tolist())
    for sequence, part in zip(found, texts, strict=True):
        assert len(part) >= 1
        assert len(sequence) <= length + (not prefix)
        assert form == "eos" or len(set(owner[part])) == 1
        whole_document = part[0] in starts and (part[-1] + 1 in starts or part[-1] + 1 == max_tokens)
        assert len(sequence) > 1 or whole_document


def stored(ids, bounds, join, prefix, joined_bytes=None):
    return SimpleNamespace(ids=ids, documents=bounds, join=join, prefix=prefix, joined_bytes=joined_bytes)


@pytest.mark.parametrize("join", ["eos", "packed"])
def test_a_corpus_with_a_prefix(rng, tiny, join):
    ids = rng.integers(0, 131, 20).astype(np.uint16)
    corpus = stored(ids, np.array([0, 9, 20], np.uint64), join, (3,), joined_bytes=50)
    lens = oracle.random_lens(rng)
    result = evaluate(tiny, corpus, lens, max_seq_len=LENGTH)
    starts = [0, 7, 14, 20] if join == "eos" else [0, 7, 9, 16, 20]
    cuts = [[3, *ids[start:end].tolist()] for start, end in pairwise(starts)]
    tokens = 20 + len(cuts)
    assert result.tokens == tokens
    assert result.bytes_per_token == pytest.approx(50 / tokens)  # upstream divides all tokens by the bytes of the joined text
    assert_scores(result.tuned, expected_scores(tiny, cuts, lens, 50 / tokens)[:-1])
    part = evaluate(tiny, corpus, max_seq_len=LENGTH, max_tokens=7)
    assert (part.tokens, part.bytes_per_token) == (8, pytest.approx(50 / 20 * 7 / 8))
    with pytest.raises(ValueError, match="no room"):
        evaluate(tiny, stored(ids, np.array([0, 20]), join, (3, 4)), max_seq_len=2)


def test_the_corpus_of_the_training_data(rng, tiny):
    ids = rng.integers(0, 131, 20)
    ours = evaluate(tiny, Corpus.from_ids(ids, prefix=(3,)), max_seq_len=LENGTH)
    assert ours == evaluate(tiny, stored(ids, np.array([0, 20]), "eos", (3,)), max_seq_len=LENGTH)
    assert ours.tokens == 23


def test_no_more_is_fetched_than_read(rng, tiny):
    corpus = Documents([random_ids(rng, 10) for _ in range(5)])
    assert evaluate(tiny, corpus, max_tokens=20).tokens == 20
    assert corpus.fetched == 2

    def endless():
        while True:
            yield np.arange(7)

    assert evaluate(tiny, endless(), max_tokens=16).tokens == 16


def test_a_memory_mapped_file(rng, tiny, tmp_path):
    ids = rng.integers(0, 131, 45).astype(np.uint16)
    ids.tofile(tmp_path / "ids.bin")
    mapped = np.memmap(tmp_path / "ids.bin", np.uint16, "r")
    assert evaluate(tiny, mapped, max_seq_len=LENGTH) == evaluate(tiny, ids.tolist(), max_seq_len=LENGTH)


def test_texts_are_documents(make_llama):
    model = InterpretableModel(make_llama(), Spelling())
    result = evaluate(model, ["hello", "there!"])
    assert result == evaluate(model, [model.encode("hello"), model.encode("there!")])
    assert result.tokens == 11


def test_every_document_may_begin_with_a_special_token(rng, tiny):
    # All positions count, that of the special token too.
    documents = [[1, *random_ids(rng, 6)] for _ in range(3)]
    result = evaluate(tiny, documents, max_seq_len=7)
    assert_scores(result.logit, expected_scores(tiny, documents, None)[:-1])


class Bytes:
    """A tokenizer with a token for every byte; as SentencePiece's, it drops a space at the start of a text."""

    def decode(self, ids):
        text = bytes(ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ")


@given(text=st.text(alphabet="a é€😀", max_size=40), cuts=st.lists(st.integers(0, 80), max_size=12))
def test_bytes_are_counted_across_pieces(text, cuts):
    ids = list(text.encode())
    model = SimpleNamespace(tokenizer=Bytes(), decode=lambda ids: Bytes().decode(ids))
    count = ByteCount(model)
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    for start, end in pairwise(edges):
        count.add(ids[start:end])
    assert count.total == len(text.removeprefix(" ").encode())


# ------------------------------------------------------------------ the result


def test_the_dictionary_is_the_documented_one(rng, tiny):
    ids = random_ids(rng, 12)
    result = evaluate(tiny, ids, oracle.random_lens(rng), max_seq_len=LENGTH)
    data = json.loads(json.dumps(result.to_dict()))
    assert data.keys() == {"tokens", "bytes_per_token", "model", "layers", "sequences", "standard_errors"}
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
