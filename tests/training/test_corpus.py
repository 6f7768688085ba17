import gzip
import json
import os
import subprocess
import sys
import threading
import time
import types

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from metalens.models.bundled import MODEL
from metalens.training.data import Corpus, in_memory, open_corpus, readers, tokenizing
from metalens.training.data import corpus as corpus_module
from metalens.training.data.cache import TokenCache, cache_folder
from metalens.training.data.tokenizing import TextTokenizer


class Bytes:
    """A tokenizer of bytes that counts what it does; 256 is BOS, 257 EOS."""

    bos_token_id, eos_token_id, eos_token, vocab_size = 256, 257, "<eos>", 258

    def __init__(self):
        self.texts = []

    def encode(self, text, add_special_tokens=True):
        self.texts.append(text)
        return [256] * add_special_tokens + list(text.encode())

    def get_vocab(self):
        return {str(i): i for i in range(258)}


class Plain:
    """As simple as they come: `encode` alone, BOS first."""

    bos_token_id = 9

    def encode(self, text):
        return [9, *text.encode()]


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


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def two(tmp_path):
    """Two documents, "ab" and "cdé", as JSON lines."""
    path = tmp_path / "two.jsonl"
    path.write_text('{"text": "ab"}\n{"text": "cdé"}\n')
    return path


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


@pytest.mark.parametrize("error", [RuntimeError("damaged"), KeyboardInterrupt()])
def test_an_interrupted_tokenization_leaves_nothing(two, cache, error):
    class Interrupted(Bytes):
        def encode(self, text, add_special_tokens=True):
            if text == "cdé":
                raise error
            return super().encode(text, add_special_tokens)

    with pytest.raises(type(error)):
        open_corpus(two, Interrupted(), cache_dir=cache)
    assert {p.suffix for p in cache.rglob("*") if p.is_file()} <= {".lock"}
    assert open_corpus(two, Bytes(), cache_dir=cache).tokens == 8


def test_a_file_that_changes_meanwhile(two, cache):
    class Slow(Bytes):
        def encode(self, text, add_special_tokens=True):
            if text == "ab":
                two.write_text("other")
            return super().encode(text, add_special_tokens)

    # With batches of one piece the file is still being read while its first document is tokenized.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "BATCH", 1)
        with pytest.raises(ValueError, match="changed while it was read"):
            open_corpus(two, Slow(), cache_dir=cache)
    assert not list(cache.glob("*.json"))


@pytest.mark.parametrize("suffix", ["ids", "documents", "json"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_damaged_caches_are_made_again(two, cache, suffix, damage):
    first = open_corpus(two, Bytes(), cache_dir=cache)
    path = cache / f"{first.fingerprint}.{suffix}"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    assert open_corpus(two, Bytes(), cache_dir=cache).ids.tolist() == [257, *b"ab", 257, *"cdé".encode()]


@pytest.mark.parametrize("suffix", ["ids", "documents"])
def test_a_flipped_bit_in_the_cache_is_noticed(two, cache, suffix):
    first = open_corpus(two, Bytes(), cache_dir=cache)
    path = cache / f"{first.fingerprint}.{suffix}"
    expected = path.read_bytes()
    for bit in range(8 * len(expected)):
        damaged = bytearray(expected)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        again = open_corpus(two, Bytes(), cache_dir=cache)
        assert (again.ids.tolist(), again.documents.tolist()) == ([257, *b"ab", 257, *"cdé".encode()], [0, 3, 8])
    assert path.read_bytes() == expected


def test_a_cache_of_an_older_version_is_used(two, cache):
    first = open_corpus(two, Bytes(), cache_dir=cache)
    path = cache / f"{first.fingerprint}.json"
    record = json.loads(path.read_text())
    assert set(record.pop("sha256")) == {"ids", "documents"}
    path.write_text(json.dumps(record))
    tokenizer = Bytes()
    assert open_corpus(two, tokenizer, cache_dir=cache).ids.tolist() == first.ids.tolist()
    assert not any("ab" in text for text in tokenizer.texts)


def test_a_record_that_is_nested_too_deep_is_made_again(two, cache):
    first = open_corpus(two, Bytes(), cache_dir=cache)
    (cache / f"{first.fingerprint}.json").write_text("[" * 100_000)
    for fact in (cache / "facts").glob("*"):
        fact.write_text("[" * 100_000)
    assert open_corpus(two, Bytes(), cache_dir=cache).ids.tolist() == first.ids.tolist()
    assert json.loads((cache / f"{first.fingerprint}.json").read_text())["tokens"] == 8


def test_file_names_of_any_bytes(tmp_path, cache):
    path = tmp_path / "texts" / os.fsdecode(b"bad\xff.txt")
    path.parent.mkdir()
    path.write_text("ab")
    os.utime(path, (0, 0))
    ids = open_corpus(path, Bytes(), cache_dir=cache).ids.tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "SETTLED", -(1 << 62))  # old enough for its hash to be remembered
        for _ in range(2):
            assert open_corpus(path.parent, Bytes(), cache_dir=cache).ids.tolist() == ids
    assert list((cache / "facts").glob("*.json"))


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


def test_what_a_killed_process_left_is_removed(two, cache):
    key = open_corpus(two, Bytes(), cache_dir=cache).fingerprint
    (cache / f"{key}.json").unlink()
    (cache / f".{key}.ids.abc.ids").write_bytes(b"half")
    (cache / ".other.ids.abc.ids").write_bytes(b"another corpus's")
    open_corpus(two, Bytes(), cache_dir=cache)
    assert {p.name for p in cache.glob(".*")} == {".other.ids.abc.ids"}


def test_of_several_at_once_one_tokenizes(two, cache):
    class Slow(Bytes):
        def encode(self, text, add_special_tokens=True):
            time.sleep(0.05)
            return super().encode(text, add_special_tokens)

    tokenizers = [Slow() for _ in range(4)]
    results = [None] * 4

    def run(i):
        results[i] = open_corpus(two, tokenizers[i], cache_dir=cache).ids.tolist()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [results[0]] * 4
    assert sum("cdé" in t.texts for t in tokenizers) == 1


OPEN = """
import sys
from mlx_lm.utils import load_tokenizer
from metalens.models.bundled import MODEL
from metalens.training.data import open_corpus
corpus = open_corpus(sys.argv[1], load_tokenizer(MODEL), cache_dir=sys.argv[2])
print(corpus.fingerprint, corpus.ids.tolist())
"""


def test_several_processes(two, cache, demo):
    processes = [subprocess.Popen([sys.executable, "-c", OPEN, two, cache], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    corpus = open_corpus(two, demo, cache_dir=cache)
    assert outputs == [f"{corpus.fingerprint} {corpus.ids.tolist()}\n"] * 2
    assert len(list(cache.glob("*.ids"))) == 1


def test_a_data_set_of_the_hub_is_read_once(cache, monkeypatch):
    def load_dataset(*_, **__):
        loads.append(1)
        return [{"text": "ab"}, {"text": "c"}]

    loads, commit = [], ["1" * 40]
    api = types.SimpleNamespace(dataset_info=lambda *_, **__: types.SimpleNamespace(sha=commit[0]))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=lambda: api))
    first = open_corpus("owner/name", Bytes(), cache_dir=cache)
    assert first.ids.tolist() == [257, *b"ab", 257, *b"c"]
    assert open_corpus("owner/name", Bytes(), cache_dir=cache).fingerprint == first.fingerprint
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as without a connection
    assert open_corpus("owner/name", Bytes(), cache_dir=cache).fingerprint == first.fingerprint
    assert len(loads) == 1


def test_where_the_cache_is(monkeypatch, tmp_path, two):
    monkeypatch.setenv("METALENS_CACHE", str(tmp_path / "from_variable"))
    assert cache_folder("given").name == "given"
    open_corpus(two, Bytes())
    assert len(list((tmp_path / "from_variable").glob("*.ids"))) == 1
    monkeypatch.delenv("METALENS_CACHE")
    assert cache_folder().parts[-3:] == (".cache", "metalens", "tokens")


def test_a_cache_that_cannot_be_written(two, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Can't write"):
        open_corpus(two, Bytes(), cache_dir=tmp_path / "file")


def test_without_locks(two, cache, monkeypatch):
    def no_locks(*_):
        raise OSError("No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert open_corpus(two, Bytes(), cache_dir=cache).tokens == 8


def test_facts_are_kept(cache):
    memory = TokenCache(cache)
    assert memory.recall("a") is None
    memory.remember("a", {"b": [1]})
    assert (memory.recall("a"), memory.recall("b")) == ({"b": [1]}, None)


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


def test_nothing_is_kept_outside_the_cache(two, cache, tmp_path):
    before = set(os.listdir(tmp_path))
    open_corpus(two, Bytes(), cache_dir=cache)
    assert set(os.listdir(tmp_path)) - before == {"cache"}
