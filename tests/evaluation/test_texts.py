"""The texts that `evaluate` reads: documents, how they are cut, and their bytes."""

from itertools import chain, pairwise
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalens import InterpretableModel, evaluate
from metalens.evaluation.text import ByteCount, Sequences
from metalens.training.data import Corpus
from support import oracle
from support.expected_scores import assert_scores, expected_scores, random_ids

LENGTH = 8


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
