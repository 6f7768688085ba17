"""The cache of tokens: whole or not there, checked when it is read, written by one process at a time."""

import json
import os
import subprocess
import sys
import threading
import time
import types

import pytest
from mlx_lm.utils import load_tokenizer

from metalens.models.bundled import MODEL
from metalens.training.data import open_corpus, readers, tokenizing
from metalens.training.data.cache import TokenCache, cache_folder
from support.byte_tokenizers import Bytes


@pytest.fixture(scope="module")
def demo():
    return load_tokenizer(MODEL)


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


def flips(path):
    """Flip one bit of a file after the other. Yield after each, and leave the file as it was."""
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        yield
    path.write_bytes(whole)


def test_a_flipped_bit_in_the_record_is_noticed(two, cache):
    """It could change the type of the ids from <u2 to >u2, or the bytes of the text."""
    key = open_corpus(two, Bytes(), cache_dir=cache).fingerprint
    memory = TokenCache(cache)
    whole = memory.open(key)
    for _ in flips(cache / f"{key}.json"):
        found = memory.open(key)
        assert found is None or (found.ids.tolist(), found.documents.tolist(), found.counts) == (
            whole.ids.tolist(),
            whole.documents.tolist(),
            whole.counts,
        )


def test_a_flipped_bit_in_a_fact_is_noticed(cache):
    memory = TokenCache(cache)
    memory.remember("file /a", {"stamp": [1, 2], "sha256": "0123"})
    (fact,) = (cache / "facts").iterdir()
    for _ in flips(fact):
        assert memory.recall("file /a") in (None, {"stamp": [1, 2], "sha256": "0123"})
    assert memory.recall("file /a") is not None


def test_a_cache_of_an_older_version_is_used(two, cache):
    first = open_corpus(two, Bytes(), cache_dir=cache)
    path = cache / f"{first.fingerprint}.json"
    record = json.loads(path.read_text())
    del record["record"]
    assert set(record.pop("sha256")) == {"ids", "documents"}
    path.write_text(json.dumps(record))
    tokenizer = Bytes()
    assert open_corpus(two, tokenizer, cache_dir=cache).ids.tolist() == first.ids.tolist()
    assert not any("ab" in text for text in tokenizer.texts)


def test_a_record_that_is_nested_too_deep_is_made_again(two, cache):
    first = open_corpus(two, Bytes(), cache_dir=cache)
    (cache / f"{first.fingerprint}.json").write_text("[" * 100_000)
    assert open_corpus(two, Bytes(), cache_dir=cache).ids.tolist() == first.ids.tolist()
    assert json.loads((cache / f"{first.fingerprint}.json").read_text())["tokens"] == 8


def test_a_fact_that_is_nested_too_deep_is_forgotten(cache):
    memory = TokenCache(cache)
    memory.remember("file /a", 3)
    (fact,) = (cache / "facts").iterdir()
    fact.write_text("[" * 100_000)
    assert memory.recall("file /a") is None
    memory.remember("file /a", 4)
    assert memory.recall("file /a") == 4


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


def test_nothing_is_kept_outside_the_cache(two, cache, tmp_path):
    before = set(os.listdir(tmp_path))
    open_corpus(two, Bytes(), cache_dir=cache)
    assert set(os.listdir(tmp_path)) - before == {"cache"}
