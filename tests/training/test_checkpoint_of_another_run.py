"""A run does not go on from the checkpoint of another one: with other settings, another model, another text. The error names the difference."""

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest

from metalens import InterpretableModel, use_precision
from metalens.training import CheckpointFolder, Corpus, open_corpus, train_loop
from metalens.training.resume import RunFacts
from support.checkpoints import CONFIG, LENGTH, begun
from support.mocks import WordTokenizer


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints")


@pytest.fixture
def ids(rng):
    return rng.integers(0, 100, 6 * LENGTH)


CHANGES = {
    "learning_rate": (0.5, r"learning_rate was 1\.0 and is 0\.5"),
    "num_steps": (5, "num_steps was 4 and is 5"),
    "seed": (2, "seed was 1 and is 2"),
    "optimizer": ("adam", "optimizer was 'sgd' and is 'adam'"),
    "dtype": ("bfloat16", "dtype was 'float32' and is 'bfloat16'"),
    "layers": ((0, 1), r"layers was None and is \[0, 1\]"),
    "rank": (2, "rank was None and is 2"),
    "max_seq_len": (20, "max_seq_len was 16 and is 20"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_refused(tiny, ids, folder, name):
    value, message = CHANGES[name]
    begun(tiny, Corpus.from_ids(ids), folder)
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"run with other settings: {message}\. Use the same, or start anew in another folder"):
        train_loop(tiny.source, tiny.unembed, Corpus.from_ids(ids), dataclasses.replace(CONFIG, **{name: value}), checkpoints=folder, resume=True)
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_settings_that_are_the_same_in_json_are_the_same(tiny, ids, folder):
    config = dataclasses.replace(CONFIG, layers=(0, 2), gradient_clip=float("inf"))
    begun(tiny, Corpus.from_ids(ids), folder, config)
    again = dataclasses.replace(config, layers=[0, 2], num_steps=np.int64(4), seed=np.int32(1))
    train_loop(tiny.source, tiny.unembed, Corpus.from_ids(ids), again, checkpoints=folder, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 4}, "layers was 3 and is 4"),
        ({"hidden": 128}, "width was 64 and is 128"),
        ({"vocab": 140}, "vocabulary was 131 and is 140"),
        ({"seed": 1}, "head was 'sha256:.*' and is 'sha256:"),
        ({"bits": 8}, "head was 'sha256:.*' and is 'sha256:"),
    ],
    ids=str,
)
def test_another_model_is_refused(tiny, make_llama, ids, folder, change, message):
    begun(tiny, Corpus.from_ids(ids), folder)
    other = InterpretableModel(make_llama(**change))
    with pytest.raises(ValueError, match=f"run with other model: .*{message}"):
        train_loop(other.source, other.unembed, Corpus.from_ids(ids), CONFIG, checkpoints=folder, resume=True)


def test_a_fine_tuned_model_with_the_same_head_is_refused(tiny, make_llama, ids, folder):
    begun(tiny, Corpus.from_ids(ids), folder)
    other = InterpretableModel(make_llama())
    norm = other.model.model.layers[0].input_layernorm
    norm.weight = norm.weight * 1.01
    with pytest.raises(ValueError, match="run with other model: weights was 'sha256:.*' and is 'sha256:"):
        train_loop(other.source, other.unembed, Corpus.from_ids(ids), CONFIG, checkpoints=folder, resume=True)


def test_a_checkpoint_that_knows_the_head_alone_is_resumed(tiny, ids, folder):
    """Checkpoints of version 0.1.0 have no hash of all weights."""
    begun(tiny, Corpus.from_ids(ids), folder)
    facts = RunFacts(CONFIG, tiny.source, tiny.unembed)
    record = facts.record()
    del record["model"]["weights"]
    facts.require_record(record)


@pytest.fixture
def no_precision(monkeypatch):
    monkeypatch.delenv("METALENS_PRECISION", raising=False)


MUON = dataclasses.replace(CONFIG, optimizer="muon", vocabulary="full")
SAMPLED = dataclasses.replace(CONFIG, vocabulary=40)


@pytest.mark.parametrize(
    ("config", "before", "now", "message"),
    [
        (CONFIG, None, "bfloat16", "it was float32 and is bfloat16"),
        (CONFIG, "bfloat16", None, "it was bfloat16 and is float32"),
        (MUON, None, "float32", "it was not set and is float32"),
        (SAMPLED, "float32", None, "it was float32 and is not set"),
    ],
)
@pytest.mark.usefixtures("no_precision")
def test_another_precision_is_refused(tiny, ids, folder, config, before, now, message):
    with use_precision(before) if before else nullcontext():
        begun(tiny, Corpus.from_ids(ids), folder, config)
    with use_precision(now) if now else nullcontext(), pytest.raises(ValueError, match=f"with another precision: {message}. Set METALENS_PRECISION"):
        train_loop(tiny.source, tiny.unembed, Corpus.from_ids(ids), config, checkpoints=folder, resume=True)


@pytest.mark.usefixtures("no_precision")
def test_a_precision_that_changes_nothing_is_the_same(tiny, ids, folder, monkeypatch):
    begun(tiny, Corpus.from_ids(ids), folder)
    monkeypatch.setenv("METALENS_PRECISION", "float32")
    train_loop(tiny.source, tiny.unembed, Corpus.from_ids(ids), CONFIG, checkpoints=folder, resume=True)


def test_a_checkpoint_that_does_not_know_its_precision_is_resumed(tiny):
    facts = RunFacts(CONFIG, tiny.source, tiny.unembed)
    record = facts.record()
    del record["precision"]
    with use_precision("bfloat16"):
        facts.require_record(record)


def test_another_text_is_refused(tiny, ids, folder):
    begun(tiny, Corpus.from_ids(ids), folder)
    for other in (ids[:-1], np.where(np.arange(ids.size) == 5, ids ^ 1, ids)):
        with pytest.raises(ValueError, match=r"The data are not those .* corpus content was '\w+' and is '\w+'"):
            train_loop(tiny.source, tiny.unembed, Corpus.from_ids(other), CONFIG, checkpoints=folder, resume=True)


def test_another_tokenizer_is_refused(tiny, folder, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 90}" for i in range(200)))

    def corpus(vocab_size):
        tokenizer = WordTokenizer(vocab_size)
        tokenizer.eos_token_id = 1
        return open_corpus(tmp_path / "text.txt", tokenizer, cache_dir=tmp_path / "cache", join="packed")

    class Other(WordTokenizer):
        def encode(self, text):
            return super().encode(text)[::-1]

    begun(tiny, corpus(100), folder)
    train_loop(tiny.source, tiny.unembed, corpus(100), CONFIG, checkpoints=folder, resume=True)
    other = Other(100)
    other.eos_token_id = 1
    changed = open_corpus(tmp_path / "text.txt", other, cache_dir=tmp_path / "cache", join="packed")
    with pytest.raises(ValueError, match=r"corpus tokenizer was '\w+' and is '\w+'"):
        train_loop(tiny.source, tiny.unembed, changed, CONFIG, checkpoints=folder, resume=True)
