import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from metalens.models.bundled import MODEL
from metalens.training.data import Corpus, open_corpus, tokenizing
from metalens.training.data import corpus as corpus_module
from metalens.training.data.tokenizing import TextTokenizer
from support.byte_tokenizers import Bytes, Plain


@pytest.fixture(scope="module")
def demo():
    return load_tokenizer(MODEL)


def llama_like():
    """A fast tokenizer of words that puts BOS before every text."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {w: i for i, w in enumerate(["the", "cat", "sat", "on", "a", "mat"], 3)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_eos_comes_before_every_document(two, cache):
    corpus = open_corpus(two, Bytes(), cache_dir=cache)
    assert corpus.ids.tolist() == [257, *b"ab", 257, *"cdé".encode()]
    assert corpus.documents.tolist() == [0, 3, 8]
    assert (corpus.tokens, corpus.bytes, corpus.joined_bytes) == (8, 6, 6 + 2 * len("<eos>"))
    assert (corpus.prefix, corpus.join) == ((256,), "eos")


def test_packed_documents_have_nothing_between_them(two, cache):
    corpus = open_corpus(two, Bytes(), join="packed", cache_dir=cache)
    assert corpus.ids.tolist() == [*b"ab", *"cdé".encode()]
    assert corpus.documents.tolist() == [0, 2, 6]
    assert (corpus.bytes, corpus.joined_bytes) == (6, 6)


def test_the_ids_are_those_of_tuned_lens_s_joined_text(tmp_path, cache, demo):
    texts = ["One document.\n", "  another\n\n", "", "the third — with ümlauts"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    corpus = open_corpus(path, demo, cache_dir=cache)
    joined = demo.eos_token.join(["", *texts])
    assert corpus.ids.tolist() == demo.encode(joined)
    assert corpus.joined_bytes == len(joined.encode())
    assert corpus.bytes == sum(len(t.encode()) for t in texts)
    assert corpus.prefix == ()


def test_a_bos_is_a_prefix_and_not_in_the_stream(tmp_path, cache):
    (tmp_path / "a.jsonl").write_text('{"text": "the cat sat"}\n{"text": "on a mat"}\n')
    corpus = open_corpus(tmp_path / "a.jsonl", llama_like(), cache_dir=cache)
    assert corpus.ids.tolist() == [1, 3, 4, 5, 1, 6, 7, 8]
    assert corpus.prefix == (0,)


def test_a_tokenizer_with_nothing_but_encode(two, cache):
    with pytest.raises(ValueError, match="no EOS token.*packed"):
        open_corpus(two, Plain(), cache_dir=cache)
    corpus = open_corpus(two, Plain(), join="packed", cache_dir=cache)
    assert corpus.ids.tolist() == [*b"ab", *"cdé".encode()]
    assert (corpus.prefix, corpus.ids.dtype) == ((9,), np.dtype("<u4"))


@pytest.mark.parametrize(("largest", "dtype"), [(65535, "<u2"), (65536, "<u4")])
def test_ids_take_the_fewest_bytes(two, cache, largest, dtype):
    class Large(Bytes):
        def encode(self, text, add_special_tokens=True):
            return [largest - i for i in super().encode(text, add_special_tokens)]

        def get_vocab(self):
            return {"a": largest}

    corpus = open_corpus(two, Large(), join="packed", cache_dir=cache)
    assert corpus.ids.dtype == np.dtype(dtype)
    assert corpus.ids[0] == largest - ord("a")


def test_ids_that_are_none(two, cache):
    class Damaged(Bytes):
        def encode(self, text, add_special_tokens=True):
            return [-1 if i == ord("c") else i for i in super().encode(text, add_special_tokens)]

    with pytest.raises(ValueError, match="The tokenizer gave ids from -1 to"):
        open_corpus(two, Damaged(), cache_dir=cache)


def test_the_second_time_nothing_is_tokenized(two, cache, tmp_path):
    first, moved = open_corpus(two, Bytes(), cache_dir=cache), tmp_path / "elsewhere.jsonl"
    two.rename(moved)
    tokenizer = Bytes()
    again = open_corpus(moved, tokenizer, cache_dir=cache)
    assert isinstance(again.ids, np.memmap)
    assert set(tokenizer.texts) <= {"a", tokenizing.PROBE}
    assert (again.ids.tolist(), again.documents.tolist(), again.bytes) == (first.ids.tolist(), first.documents.tolist(), first.bytes)
    assert again.fingerprint == first.fingerprint
    assert again.describe()["sources"][0]["name"] == str(moved)


def test_the_fingerprint_changes_with_text_tokenizer_and_joining(two, cache, tmp_path):
    class Other(Bytes):
        def get_vocab(self):
            return super().get_vocab() | {"new": 258}

    class OtherEos(Bytes):
        eos_token_id = 0

    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "ab"}\n{"text": "cdf"}\n')
    corpora = [
        open_corpus(two, Bytes(), cache_dir=cache),
        open_corpus(two, Bytes(), cache_dir=cache, join="packed"),
        open_corpus(two, Other(), cache_dir=cache),
        open_corpus(two, OtherEos(), cache_dir=cache),
        open_corpus(other, Bytes(), cache_dir=cache),
        open_corpus([two, other], Bytes(), cache_dir=cache),
        open_corpus([other, two], Bytes(), cache_dir=cache),
        open_corpus(two, Bytes(), cache_dir=cache, max_tokens=1),
    ]
    assert len({c.fingerprint for c in corpora}) == len(corpora)


def test_what_a_fast_tokenizer_did_last_is_no_part_of_it():
    tokenizer = llama_like()
    tokenizer.pad_token = "</s>"
    before = TextTokenizer(tokenizer).fingerprint()
    tokenizer(["the cat", "a"], truncation=True, max_length=1, padding="max_length")
    assert TextTokenizer(tokenizer).fingerprint() == before
    tokenizer.add_tokens(["dog"])
    assert TextTokenizer(tokenizer).fingerprint() != before


def test_the_wrapper_of_mlx_lm_makes_no_difference(demo):
    assert TextTokenizer(demo).fingerprint() == TextTokenizer(demo._tokenizer).fingerprint()


def test_describe_is_json_and_says_all(two, cache):
    said = open_corpus(two, Bytes(), cache_dir=cache).describe()
    assert json.loads(json.dumps(said)) == said
    assert (said["documents"], said["tokens"], said["bytes"], said["join"], said["prefix"]) == (2, 8, 6, "eos", [256])
    assert said["sources"] == [
        {"name": str(two), "kind": "json-lines", "bytes": two.stat().st_size, "field": "text"} | {"sha256": said["sources"][0]["sha256"]}
    ]
    assert said["tokenizer"]["class"] == "Bytes"


@pytest.mark.parametrize("join", ["eos", "packed"])
def test_a_special_token_that_a_text_spells_is_this_token(tmp_path, cache, demo, join):
    """As transformers and tuned-lens read it. Text and JSON Lines, training and prompts, do the same."""
    text, eos = f"One text.{demo.eos_token}Another one.", demo.eos_token_id
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    expected = [*demo.encode("One text."), eos, *demo.encode("Another one.")]
    assert demo.encode(text) == expected
    for name in ("a.txt", "a.jsonl"):
        found = open_corpus(tmp_path / name, demo, join=join, cache_dir=cache)
        assert found.ids.tolist() == [eos] * (join == "eos") + expected
        assert len(found.documents) == 2  # still one document


def test_texts_without_tokens(tmp_path, cache):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="no tokens in the text"):
        open_corpus(tmp_path / "a.jsonl", Bytes(), join="packed", cache_dir=cache)


@pytest.mark.parametrize(("options", "message"), [({"join": "space"}, "join must be"), ({"max_tokens": 0}, "max_tokens must be")])
def test_settings_are_checked(two, cache, options, message):
    with pytest.raises(ValueError, match=message):
        open_corpus(two, Bytes(), cache_dir=cache, **options)


def test_the_format_is_part_of_the_key(two, cache, monkeypatch):
    before = open_corpus(two, Bytes(), cache_dir=cache).fingerprint
    monkeypatch.setattr(corpus_module, "FORMAT", -1)
    assert open_corpus(two, Bytes(), cache_dir=cache).fingerprint != before


@pytest.mark.parametrize("ids", [[3, 1, 2], np.array([3, 1, 2], np.uint16), mx.array([3, 1, 2])])
def test_ids_at_hand(ids):
    corpus = Corpus.from_ids(ids)
    assert (corpus.ids.tolist(), corpus.documents.tolist(), corpus.tokens) == ([3, 1, 2], [0, 3], 3)
    assert (corpus.bytes, corpus.prefix, corpus.join) == (None, (), "eos")
    assert corpus.fingerprint == Corpus.from_ids([3, 1, 2]).fingerprint
    assert corpus.fingerprint not in {Corpus.from_ids([3, 1, 4]).fingerprint, Corpus.from_ids([3, 1, 2], prefix=[5]).fingerprint}
    assert json.loads(json.dumps(corpus.describe())) == corpus.describe()


@pytest.mark.parametrize(
    ("ids", "error"), [([], TypeError), (np.zeros(0, int), ValueError), ([0.5], TypeError), ([[1]], ValueError), ([-1], ValueError)]
)
def test_ids_that_are_not_ids(ids, error):
    with pytest.raises(error):
        Corpus.from_ids(ids)
