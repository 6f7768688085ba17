"""The beginning-of-sequence token: before every sequence, from every source, never twice, and never where it was switched off."""

import json
import logging
import re
import warnings

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel, evaluate, train
from metalens.compat import mlxterp
from metalens.evaluation.text import Sequences
from metalens.training.data import Corpus, Sampler, open_corpus
from metalens.utils.errors import InvalidValueError
from support.bos import ASSISTANT, BOS, EOS, TEMPLATE, USER, bos_tokenizer, words
from support.mocks import tiny_llama

IDS = [5 + i * i % 80 for i in range(70)]
TEXT = words(IDS)
LENGTH = 16
SMALL = {"recipe": "mlxterp", "max_seq_len": LENGTH, "num_steps": 4, "seed": None}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METALENS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model():
    return InterpretableModel(tiny_llama(), bos_tokenizer())


@pytest.fixture
def seen(model, monkeypatch):
    """Return a list that gets the sequences that go through the model."""
    _ = model.unembed
    found, plain = [], model.source._capture

    def capture(ids, *rest, **options):
        found.extend(ids.tolist())
        return plain(ids, *rest, **options)

    monkeypatch.setattr(model.source, "_capture", capture)
    return found


def cut(ids, length=LENGTH - 1):
    return [[BOS, *ids[start : start + length]] for start in range(0, len(ids), length)]


SOURCES = {
    "a string": TEXT,
    "a text that spells BOS": f"<s> {TEXT}",
    "ids": IDS,
    "ids that begin with BOS": [BOS, *IDS],
    "an array": mx.array(IDS),
    "a NumPy array": np.array(IDS),
}


@pytest.mark.parametrize("text", SOURCES.values(), ids=SOURCES)
def test_evaluation_puts_it_before_every_sequence(model, seen, text):
    evaluation = evaluate(model, text, max_seq_len=LENGTH)
    assert seen == cut(IDS)
    assert evaluation.tokens == sum(map(len, seen))


def test_evaluation_of_documents(model, seen):
    evaluate(model, [words(IDS[:20]), words(IDS[20:40]), IDS[40:44]], max_seq_len=LENGTH)
    assert seen == [*cut(IDS[:20]), *cut(IDS[20:40]), *cut(IDS[40:44])]


def test_a_text_and_its_json_lines_differ_by_the_separator_alone(model, tmp_path):
    """They differed by 2 nats per token on Gemma 3, because the text had BOS before its first sequence only."""
    (tmp_path / "h.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    corpus = open_corpus(tmp_path / "h.jsonl", model.tokenizer)
    assert list(map(mx.array.tolist, Sequences(model, corpus, LENGTH))) == cut([EOS, *IDS])
    packed = open_corpus(tmp_path / "h.jsonl", model.tokenizer, join="packed")
    assert evaluate(model, packed, max_seq_len=LENGTH).model == pytest.approx(evaluate(model, TEXT, max_seq_len=LENGTH).model)


def test_evaluation_without_it(model, seen):
    evaluate(model, TEXT, max_seq_len=LENGTH, bos=False)
    assert seen == [IDS[start : start + LENGTH] for start in range(0, len(IDS), LENGTH)]
    seen.clear()
    evaluate(model, Corpus.from_ids(IDS, prefix=(BOS,)), max_seq_len=LENGTH, bos=False)
    assert seen == [IDS[start : start + LENGTH] for start in range(0, len(IDS), LENGTH)]


@pytest.mark.parametrize("data", [[TEXT], IDS, [BOS, *IDS], mx.array(IDS), "file"], ids=["texts", "ids", "ids with BOS", "array", "file"])
def test_training_puts_it_before_every_sequence(model, seen, tmp_path, data):
    separator = []
    if data == "file":
        data = tmp_path / "h.txt"
        data.write_text(TEXT)
    if not isinstance(data, mx.array) and (isinstance(data, type(tmp_path)) or isinstance(data[0], str)):
        separator = [EOS]
    train(model, data, **SMALL)
    assert seen == cut([*separator, *IDS])[:4]
    seen.clear()
    train(model, data, bos=False, **SMALL)
    first = next(iter(seen))
    assert first[: len(separator) + 3] == ([*separator, *IDS[:3]] if data != [BOS, *IDS] else [BOS, *IDS[:2]])


def test_mlxterp_s_call_has_it_in_metalens_and_not_in_compat(model, seen):
    options = {"num_steps": 4, "max_seq_len": LENGTH, "verbose": False}
    model.train_tuned_lens([words(IDS[:30]), words(IDS[30:])], **options)
    assert seen == cut(IDS)[:4]
    seen.clear()
    model.train_tuned_lens([IDS[:30], IDS[30:]], **options)
    assert seen == cut(IDS)[:4]
    assert "mlxterp's convention" in InterpretableModel.train_tuned_lens.__doc__
    compat = mlxterp.InterpretableModel(model.model, model.tokenizer)
    assert (compat.training_corpus([TEXT]).ids.tolist(), compat.training_corpus([TEXT]).prefix) == ([BOS, *IDS], ())
    assert "only the first sequence" in mlxterp.InterpretableModel.__doc__


def test_documents_that_spell_it_do_not_have_it_twice(model, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"text": f"<s>{words(ids)}"}) + "\n" for ids in (IDS[:10], IDS[10:40])))
    with pytest.warns(UserWarning, match="they are read once"):
        corpus = open_corpus(path, model.tokenizer, join="packed")
    sampler = Sampler(corpus, LENGTH)
    assert [s.tolist() for s in sampler.take_tokens(40)] == [*cut(IDS[:10]), *cut(IDS[10:40])]


def test_a_prompt_that_spells_it_is_read_once(model):
    with pytest.warns(UserWarning, match="begins with '<s>', which the tokenizer adds too"):
        assert model.read("<s> w5 w6").token_ids == [BOS, 5, 6]
    chat = model.tokenizer.apply_chat_template([{"role": "user", "content": "w7"}], tokenize=False, add_generation_prompt=True)
    with pytest.warns(UserWarning, match="it is read once"):
        assert model.read(chat).token_ids == [BOS, USER, 7, ASSISTANT]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.read("w5 w6").token_ids == [BOS, 5, 6]
        assert model.encode("w5 w6", bos=False) == [5, 6]
        assert model.encode_chat("w7") == [BOS, USER, 7, ASSISTANT]
        assert model.encode_chat([{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}])[-3:] == [ASSISTANT, 8, ASSISTANT]
        assert model.to_str_tokens("w5", prepend_bos=True) == ["<s>", "w5"]


def test_a_tokenizer_without_a_chat_template_says_so():
    model = InterpretableModel(tiny_llama(), bos_tokenizer(None))
    with pytest.raises(ValueError, match="no chat template"):
        model.encode_chat("w7")


def test_several_texts_as_tokens(model):
    assert model.to_str_tokens(["w5 w6", "w7"]) == [["<s>", "w5", "w6"], ["<s>", "w7"]]
    compat = mlxterp.InterpretableModel(model.model, model.tokenizer)
    assert compat.to_str_tokens(["w5 w6", "w7"]) == [["<s>", "w5", "w6"], ["<s>", "w7"]]
    short, long = compat.logit_lens(["w5", "w6 w7 w8 w9"], position=-1)
    assert short == compat.logit_lens("w5", position=-1)
    assert long == compat.logit_lens("w6 w7 w8 w9", position=-1)


def test_a_long_text_is_encoded_without_the_tokenizers_warning(model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    evaluate(model, words(IDS * 2), max_seq_len=LENGTH)
    assert "longer than the specified maximum" not in caplog.text


@pytest.mark.parametrize("form", ["string", "corpus"])
def test_bits_per_byte_are_about_the_whole_text(model, tmp_path, form):
    """Upstream divides by the ratio of the whole data set; the first tokens alone gave a number that differed by 6 %."""
    text = words(IDS[:30]) + " </s>" * 40  # tokens of other lengths after those that are read
    if form == "corpus":
        (tmp_path / "h.jsonl").write_text(json.dumps({"text": text}) + "\n")
        read = open_corpus(tmp_path / "h.jsonl", model.tokenizer)
        ratio = (len(text) + len("</s>")) / 71
    else:
        read, ratio = text, len(text) / 70
    found = evaluate(model, read, max_seq_len=LENGTH, max_tokens=30)
    assert found.bytes_per_token * found.tokens == pytest.approx(ratio * 30)


CHATS = [
    {"messages": [{"role": "user", "content": "w10 w11"}, {"role": "assistant", "content": "w12"}]},
    {"prompt": "w13", "completion": "w14 w15"},
]
TURNS = [[USER, 10, 11, ASSISTANT, 12], [USER, 13, ASSISTANT, 14, 15]]


def test_conversations_are_text_in_the_chat_template(model, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in CHATS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the template spells BOS: no news
        packed = open_corpus(path, model.tokenizer, field="messages", join="packed")
    assert (packed.ids.tolist(), packed.documents.tolist(), packed.prefix) == ([*TURNS[0], *TURNS[1]], [0, 5, 10], (BOS,))
    assert open_corpus(path, model.tokenizer, field="messages").ids.tolist() == [EOS, *TURNS[0], EOS, *TURNS[1]]
    other = open_corpus(path, bos_tokenizer(TEMPLATE.replace("assistant", "user")), field="messages", join="packed")
    assert other.fingerprint != packed.fingerprint
    lens = train(model, path, field="messages", recipe="mlxterp", num_steps=1, max_seq_len=10)
    assert lens.provenance["training"]["data"]["documents"] == 2


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        ({"messages": [{"role": "user"}]}, TEMPLATE, 'line 1: a message must be like {"role": "user", "content": "..."}'),
        ({"messages": ["hello"]}, TEMPLATE, "line 1: a message must be like"),
        ({"prompt": "w5"}, TEMPLATE, "line 1: there is no field 'messages'; there are 'prompt'"),
        (CHATS[0], None, "The tokenizer has no chat template"),
        (CHATS[0], "{{ raise_exception('no users') }}", "The chat template refuses the messages: no users"),
    ],
)
def test_faults_of_conversations(tmp_path, record, template, message):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(InvalidValueError, match=re.escape(message)):
        open_corpus(path, bos_tokenizer(template), field="messages")
