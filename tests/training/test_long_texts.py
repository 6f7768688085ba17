"""Texts that are tokenized in parts, in batches and by several processes give the ids of the whole."""

import gzip
import json

import pytest
from mlx_lm.utils import load_tokenizer

from metalens.models.bundled import MODEL
from metalens.training.data import corpus as corpus_module
from metalens.training.data import in_memory, open_corpus, readers, tokenizing
from support.byte_tokenizers import Bytes


@pytest.fixture(scope="module")
def demo():
    return load_tokenizer(MODEL)


def test_long_texts_are_one_document(tmp_path, cache, monkeypatch, demo):
    text = "\n".join(f"Line {i} of the text, which says something." for i in range(60))
    (tmp_path / "a.txt").write_text(text)
    whole = open_corpus(tmp_path / "a.txt", demo, cache_dir=cache).ids.tolist()
    monkeypatch.setattr(readers, "BLOCK", 100)
    parts = open_corpus(tmp_path / "a.txt", demo, cache_dir=tmp_path / "other")
    assert parts.ids.tolist() == whole
    assert parts.documents.tolist() == [0, len(whole)]


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_batches_do_not_matter(tmp_path, cache, monkeypatch, demo, batch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"Document {i} " * i}) + "\n" for i in range(20)))
    expected = open_corpus(path, demo, cache_dir=cache)
    monkeypatch.setattr(tokenizing, "BATCH", batch)
    seen = []
    got = open_corpus(path, demo, cache_dir=tmp_path / "other", progress=seen.append)
    assert got.ids.tolist() == expected.ids.tolist()
    assert (sum(seen), len(seen), seen[0]) == (got.tokens, 1 + -(-20 // batch), 0)


def test_workers_do_not_matter(tmp_path, cache, monkeypatch, demo):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"Document {i} " * i}) + "\n" for i in range(20)))
    expected = open_corpus(path, demo, cache_dir=cache)
    monkeypatch.setattr(tokenizing, "BATCH", 2)
    got = open_corpus(path, demo, cache_dir=tmp_path / "other", workers=2)
    assert (got.ids.tolist(), got.documents.tolist(), got.fingerprint) == (expected.ids.tolist(), expected.documents.tolist(), expected.fingerprint)


def test_reading_stops_when_there_are_enough_tokens(tmp_path, cache, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abcd"}\n' * 5 + "damage that is not reached")
    monkeypatch.setattr(tokenizing, "BATCH", 2)
    corpus = open_corpus(path, Bytes(), cache_dir=cache, max_tokens=6)
    assert (corpus.tokens, corpus.bytes) == (10, 8)


def test_a_long_document_of_json_is_tokenized_in_parts(tmp_path, cache, monkeypatch, demo):
    """Memory does not grow with a document: no call of the tokenizer sees more than a block."""
    text = "\n".join(f"Line {i} of the text, which says something." for i in range(60))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "two"}))
    whole = open_corpus(tmp_path / "a.jsonl", demo, cache_dir=cache)
    monkeypatch.setattr(readers, "BLOCK", 100)
    parts = open_corpus(tmp_path / "a.jsonl", demo, cache_dir=tmp_path / "other")
    assert parts.ids.tolist() == whole.ids.tolist()
    assert parts.documents.tolist() == whole.documents.tolist()
    for source in (readers.JsonLines(tmp_path / "a.jsonl", "text"), in_memory.TextList([text, "two"])):
        pieces = list(source.pieces())
        assert max(len(piece.text) for piece in pieces) <= 100
        assert "".join(piece.text for piece in pieces) == text + "two"
        assert [piece.text for piece in pieces if piece.starts] == [pieces[0].text, "two"]


@pytest.mark.parametrize(
    ("name", "differs"), [("a.jsonl", (False, True)), ("a.txt", (False, False)), ("a.jsonl.gz", (True, True)), ("texts", (False, True))]
)
def test_tokens_of_documents_that_were_not_cut_before_have_another_key(tmp_path, cache, monkeypatch, name, differs):
    """Text files always came in parts, and documents within a block still are whole: their tokens in the cache stay good."""
    record = json.dumps({"text": "some words"}).encode()
    source = in_memory.TextList(["some words"]) if name == "texts" else tmp_path / name
    if name != "texts":
        source.write_bytes(gzip.compress(record) if name.endswith(".gz") else record)

    def key():
        return open_corpus(source, Bytes(), cache_dir=cache).fingerprint

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "_may_be_cut", lambda *_: False)
        before = key()
    keys = [key()]
    monkeypatch.setattr(corpus_module, "BLOCK", 5)
    keys.append(key())
    assert tuple(each != before for each in keys) == differs
