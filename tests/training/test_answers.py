"""Where the answers are in a conversation's text, and which tokens are theirs, for templates of many kinds."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from metalens.models.plain_encoder import PlainEncoder
from metalens.training.data import Corpus, open_corpus, read_inputs, readers
from metalens.training.data.answers import rendered_answers
from metalens.training.data.cache import TokenCache
from metalens.training.data.conversations import Conversation, conversation_of
from metalens.training.data.tokenizing import TextTokenizer
from metalens.utils.errors import InvalidValueError
from support.bos import ASSISTANT, BOS, EOS, USER, bos_tokenizer

# The shapes of templates in use, shortened: {name: (template, what ends an answer)}.
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "smollm, with a system prompt of its own": (
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "llama 3": (
        "<|begin|>{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
        "<|eot|>",
    ),
    "mistral": (
        "<s>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }}</s>{% else %}[INST] {{ m.content }} [/INST]{% endif %}"
        "{% endfor %}",
        "</s>",
    ),
    "gemma": (
        "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
    ),
    "qwen 3, whose last answer alone has thoughts": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% if loop.last %}<think>\n{{ m.content.split('</think>')[0] if '</think>' in m.content else '' }}\n</think>\n\n{% endif %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "one that closes the conversation": (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}</turn>{% if loop.last and not add_generation_prompt %}\n<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}",
        None,  # the last answer with what closes it
    ),
}


class Templated:
    """A tokenizer that is a chat template."""

    def __init__(self, template):
        self.tokenizer = bos_tokenizer(template)
        self.chat_template = template

    def encode(self, text):
        return list(text.encode())

    def apply_chat_template(self, *args, **options):
        return self.tokenizer.apply_chat_template(*args, **options)


def chat(*turns):
    """A conversation of turns 'u: text', 'a: text', 's: text'."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]


def answers_in(template, messages):
    text, spans = rendered_answers(PlainEncoder(Templated(template)), conversation_of({"messages": messages}, "messages", "here"))
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if TEMPLATES[name][1]])
@pytest.mark.parametrize(
    ("turns", "answers"),
    [
        (["u: What?", "a: That."], ["That."]),
        (["u: What?", "a: One.", "u: And?", "a: Two.", "u: Again?", "a: One."], ["One.", "Two.", "One."]),
        (["u: What?", "a: ", "u: What?", "a: What?"], ["", "What?"]),
        (["u: a</s>\n<think>", "a: user\nassistant", "u: a"], ["user\nassistant"]),
        (["u: What?"], []),
        (["u: é漢字🙂", "a: 🙂\n\n1. é", "u: x", "a: x"], ["🙂\n\n1. é", "x"]),
    ],
    ids=["one", "several turns", "an empty answer", "words of templates", "no answer", "unicode"],
)
def test_an_answer_is_what_the_model_writes(name, turns, answers):
    template, end = TEMPLATES[name]
    found = answers_in(template, chat(*turns))
    if name.startswith("mistral"):
        found = [answer.removeprefix(" ") for answer in found]
    if name.startswith("qwen") and found and turns[-1][0] == "a":  # as the model would write it
        found[-1] = found[-1].removeprefix("<think>\n\n</think>\n\n")
    assert found == [answer + end for answer in answers]


def test_thoughts_are_of_the_last_answer_and_left_out_of_earlier_ones():
    turns = chat("u: a", "a: first</think>b", "u: c", "a: second</think>d")
    assert answers_in(TEMPLATES["qwen 3, whose last answer alone has thoughts"][0], turns) == [
        "b<|im_end|>",
        "<think>\nsecond\n</think>\n\nd<|im_end|>",
    ]


def test_a_template_that_begins_an_answer_with_thoughts():
    """It asks the model to think, and leaves the thoughts out of what is past: the words of an answer are what is left of it."""
    template = TEMPLATES["chatml"][0].replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert answers_in(template, chat("u: a", "a: b", "u: c", "a: ")) == ["b<|im_end|>", "<|im_end|>"]


def test_white_space_around_an_answer_is_the_template_s():
    assert answers_in(TEMPLATES["llama 3"][0], chat("u: a", "a:  b \n", "u: c", "a: d\n")) == ["b<|eot|>", "d<|eot|>"]
    assert answers_in(TEMPLATES["chatml"][0], chat("u: a", "a:  b \n")) == [" b \n<|im_end|>"]


def test_a_conversation_may_begin_with_an_answer():
    assert answers_in(TEMPLATES["chatml"][0], chat("a: Hello!", "u: a", "a: b")) == ["Hello!<|im_end|>", "b<|im_end|>"]
    assert answers_in(TEMPLATES["smollm, with a system prompt of its own"][0], chat("a: Hello!", "u: a")) == ["Hello!<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "number"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}", 1),
        ("{% for m in messages | reverse %}{{ m.role }}: {{ m.content }}\n{% endfor %}", 1),
        ("{% for m in messages %}{% if not (m.role == 'assistant' and loop.index == 2) %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}", 1),
        ("{{ messages | length }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", 1),
        (TEMPLATES["one that closes the conversation"][0], 1),
    ],
    ids=["changes the words", "reverses the turns", "leaves an answer out", "counts the turns", "closes the conversation"],
)
def test_a_template_that_hides_an_answer_is_refused_by_name(template, number, tmp_path):
    turns = chat("u: a", "a: b", "u: c", "a: d")
    with pytest.raises(InvalidValueError, match=rf"conversation 0: The answer in message {number} can't be found.*changes it.*loss_on='all'"):
        open_corpus(read_inputs([turns]), Templated(template), loss_on="answers", join="packed", cache_dir=tmp_path)
    assert open_corpus(read_inputs([turns]), Templated(template), join="packed", cache_dir=tmp_path).counted is None


# ------------------------------------------------------------------ records


def test_the_forms_of_a_conversation():
    messages = chat("u: a", "a: b", "u: c", "a: d")
    assert conversation_of({"messages": messages}, "messages", "here") == Conversation(messages, (1, 3))
    pair = {"prompt": "a", "completion": "b"}
    assert conversation_of(pair, "messages", "here") == conversation_of(pair, "conversation", "here") == Conversation(messages[:2], (1,))
    turns = {"prompt": messages[:3], "completion": messages[3:]}  # an answer in the prompt is none
    assert conversation_of(turns, "messages", "here") == Conversation(messages, (3,))
    assert conversation_of({"messages": "text"}, "messages", "here") is None
    assert conversation_of(pair, "text", "here") is None


def test_conversations_from_python_files_and_tables_are_the_same(tmp_path):
    """A list of messages, lists of them and records; JSON Lines; and Parquet, also with a prompt and a completion."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    one, two = chat("u: w5 w6", "a: w7"), chat("u: w8", "a: w9 w10")
    records = [{"prompt": "w5 w6", "completion": "w7"}, {"prompt": "w8", "completion": "w9 w10"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in (one, two)))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "pairs.parquet")
    pq.write_table(pa.Table.from_pylist([{"messages": one}, {"messages": two}]), tmp_path / "turns.parquet")
    forms = [[one, two], records, [{"messages": one}, records[1]], tmp_path / "a.jsonl", tmp_path / "pairs.parquet", tmp_path / "turns.parquet"]
    found = [corpus_of(form, tmp_path) for form in forms]
    for corpus in found:
        assert corpus.ids.tolist() == [USER, 5, 6, ASSISTANT, 7, EOS, USER, 8, ASSISTANT, 9, 10, EOS]
        assert corpus.counted.tolist() == [x in (3, 4, 8, 9, 10) for x in range(12)]
    alone = corpus_of(one, tmp_path)
    assert alone.ids.tolist() == found[0].ids[:6].tolist()
    assert len({corpus.fingerprint for corpus in found}) == 4  # the first three have the same messages


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([chat("u: a"), {"text": "b"}], "conversation 1: expected a list of messages, or an object with 'messages'.*got 'text'"),
        ([{}], "conversation 0: expected a list of messages.*an empty object"),
        ([[{"role": "user"}]], "conversation 0: a message must be like"),
        ([{"prompt": 1, "completion": "a"}], "conversation 0: a message must be like"),
    ],
)
def test_what_is_no_conversation(data, message):
    with pytest.raises(InvalidValueError, match=message):
        read_inputs(data)


# ------------------------------------------------------------------ tokens

WITH_EOS = (
    "<s>{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }}{% if m['role'] == 'assistant' %} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def corpus_of(data, folder, tokenizer=None, **options):
    tokenizer = tokenizer or bos_tokenizer(WITH_EOS)
    options = {"loss_on": "answers", "join": "packed", "field": "messages", "cache_dir": folder / "cache"} | options
    return open_corpus(read_inputs(data, field="messages"), tokenizer, **options)


def merging():
    """A tokenizer of byte pairs that merges across the marks of a template: '\\n\\n' and ': ' with letters are tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    texts = ["assistant:\n\nuser:\n\n", "\n\nYes.\n\nNo.\n\n", "user: assistant: Yes. No.", ":\nYes.\n", ": No\n\n"] * 4
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template="{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}",
    )


class Slow:
    """A tokenizer that has `encode` alone."""

    def __init__(self, fast):
        self.fast, self.chat_template = fast, fast.chat_template

    def encode(self, text):
        return self.fast.encode(text, add_special_tokens=False)

    def apply_chat_template(self, *args, **options):
        return self.fast.apply_chat_template(*args, **options)


@pytest.mark.parametrize("kind", ["fast", "slow"])
@pytest.mark.parametrize(
    "turns",
    [
        ["u: Hm", "a: Yes."],
        ["u: Hm", "a: \nYes.\n", "u: \n", "a: \n\n\nNo.\n\n"],
        ["u: Yes.\n\n", "a: No\n", "u: é", "a: é🙂é"],
        ["u: a", "a: ", "u: b", "a: \n"],
    ],
)
def test_a_token_with_a_character_of_an_answer_is_of_the_answer(kind, turns):
    """Also one that the template's line break is merged into; by the offsets that fast tokenizers give."""
    fast = merging()
    text = TextTokenizer(Slow(fast) if kind == "slow" else fast)
    conversation = conversation_of({"messages": chat(*turns)}, "messages", "here")
    (piece,) = text.rendered(readers.Piece("", True, conversation), with_answers=True)
    ((ids, answers),) = text.encode_pieces([piece])
    offsets = fast(piece.text, return_offsets_mapping=True, add_special_tokens=False)
    assert ids.tolist() == offsets["input_ids"]
    expected = [any(a < b and a < end and start < b for a, b in piece.answers) for start, end in offsets["offset_mapping"]]
    if kind == "fast":
        assert answers.tolist() == expected
    else:  # all of them, and few others
        assert not [at for at, (ours, theirs) in enumerate(zip(answers, expected, strict=True)) if theirs and not ours]
        assert sum(answers) <= sum(expected) + 2 * len(piece.answers)
    if "\n\n\nNo." in piece.text:
        assert any(start < a < end for start, end in offsets["offset_mapping"] for a, _ in piece.answers)  # the case occurs


def test_the_prediction_counts_at_the_token_before(tmp_path):
    data = [chat("u: w5 w6", "a: w7 w8", "u: w9", "a: "), chat("s: w10", "u: w11", "a: w12")]
    packed, joined = corpus_of(data, tmp_path), corpus_of(data, tmp_path, join="eos")
    system = bos_tokenizer().convert_tokens_to_ids("<unk>")
    first, second = [USER, 5, 6, ASSISTANT, 7, 8, EOS, USER, 9, ASSISTANT, EOS], [system, 10, USER, 11, ASSISTANT, 12, EOS]
    assert packed.ids.tolist() == first + second
    assert packed.prefix == (BOS,)
    #                               u  5  6  a  7  8  e  u  9  a  e    s  10 u  11 a  12 e
    expected = np.array([*map(bool, [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 0]), *map(bool, [0, 0, 0, 0, 1, 1, 0])])
    assert packed.counted.tolist() == expected.tolist()
    assert joined.ids.tolist() == [EOS, *first, EOS, *second]
    assert joined.counted.tolist() == [False, *expected[:11], False, *expected[11:]]
    assert (packed.counted_tokens, packed.identity()["counted"], packed.describe()["counted"]) == (6, 6, 6)
    other = corpus_of(data, tmp_path, loss_on="all")
    assert (other.counted, other.counted_tokens) == (None, 18)
    assert "counted" not in other.identity()
    assert other.fingerprint != packed.fingerprint


def test_an_answer_at_the_start_of_a_document_has_no_token_before_it(tmp_path):
    bare = bos_tokenizer("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    data = [chat("a: w5", "u: w6"), chat("a: w7 w8")]
    assert corpus_of(data, tmp_path, bare).counted.tolist() == [False, False, True, False]
    assert corpus_of(data, tmp_path, bare, join="eos").counted.tolist() == [True, False, False, True, True, False]  # the EOS predicts it


def test_long_conversations_in_parts_workers_and_batches(tmp_path, monkeypatch):
    """Answers go over the cut of a part; the mask is that of the whole."""
    rng = np.random.default_rng(0)
    data = [
        chat(*(f"{'ua'[turn % 2]}: " + " ".join(f"w{i}" for i in rng.integers(5, 96, rng.integers(1, 40))) for turn in range(rng.integers(1, 9))))
        for _ in range(30)
    ]
    whole = corpus_of(data, tmp_path)
    monkeypatch.setattr(readers, "BLOCK", 37)
    parts = corpus_of(data, tmp_path, cache_dir=tmp_path / "parts")
    workers = corpus_of(data, tmp_path, cache_dir=tmp_path / "workers", workers=2)
    for other in (parts, workers):
        assert (other.ids.tolist(), other.counted.tolist()) == (whole.ids.tolist(), whole.counted.tolist())


def test_the_cache_keeps_the_mask_and_notices_damage(tmp_path):
    data = [chat("u: w5 w6", "a: w7 w8")]
    made = corpus_of(data, tmp_path)
    assert isinstance(made.counted, np.memmap)
    mask = made.counted.tolist()
    calls = []
    tokenizer = bos_tokenizer(WITH_EOS)
    plain = TextTokenizer.encode_pieces
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextTokenizer, "encode_pieces", lambda *args: calls.append(1) or plain(*args))
        again = corpus_of(data, tmp_path, tokenizer)
        assert (again.counted.tolist(), calls) == (mask, [])
        file = next((tmp_path / "cache").glob("*.counted"))
        content = bytearray(file.read_bytes())
        content[0] ^= 1
        file.write_bytes(content)
        healed = corpus_of(data, tmp_path, tokenizer)
        assert (healed.counted.tolist(), calls) == (mask, [1])
        file.unlink()
        assert corpus_of(data, tmp_path, tokenizer).counted.tolist() == mask
    assert TokenCache(tmp_path / "cache").open(made.fingerprint).counted.tolist() == mask


def test_tokens_of_all_text_need_no_mask_on_disk(tmp_path):
    corpus_of([chat("u: w5", "a: w6")], tmp_path, loss_on="all")
    assert not list((tmp_path / "cache").glob("*.counted"))


def test_reading_stops_by_the_tokens_that_count(tmp_path, monkeypatch):
    from metalens.training.data import tokenizing

    monkeypatch.setattr(tokenizing, "BATCH", 1)
    data = [chat("u: w5 w6 w7", "a: w8")] * 10  # two tokens count: w8 and EOS
    assert corpus_of(data, tmp_path, max_tokens=5).counted_tokens == 6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["plain text, no chat"], "text 0: this is plain text.*field='messages'"),
        ([chat("u: w5"), chat("s: w5", "u: w6")], "There is no answer in the conversations"),
    ],
)
def test_texts_without_answers(tmp_path, data, message):
    with pytest.raises(InvalidValueError, match=message):
        corpus_of(data, tmp_path)


# ------------------------------------------------------------------ ids with a mask


@pytest.mark.parametrize("form", [list, np.array, lambda mask: np.array(mask, bool)])
def test_a_mask_of_ids(form):
    corpus = Corpus.from_ids([5, 6, 7, 8], answers=form([1, 0, 1, 1]))
    assert corpus.counted.tolist() == [False, True, True, False]
    assert corpus.fingerprint not in (Corpus.from_ids([5, 6, 7, 8]).fingerprint, Corpus.from_ids([5, 6, 7, 8], answers=[0, 0, 1, 0]).fingerprint)
    shorter = Corpus.from_ids([0, 5, 6, 7], answers=[0, 0, 1, 1]).with_prefix([0])
    assert (shorter.ids.tolist(), shorter.counted.tolist()) == ([5, 6, 7], [True, True, False])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([1, 0], r"must be true or false for each of the 4 ids; it is int64 \(2,\)"),
        ([[1, 0, 1, 1]], "must be true or false"),
        ([0.5, 1, 0, 0], "must be true or false"),
        ([-100, 5, 6, 7], "must be true or false"),
        ([0, 0, 0, 0], "no true value"),
        ([1, 0, 0, 0], "only for the first token"),
    ],
)
def test_masks_that_are_none(mask, message):
    with pytest.raises(InvalidValueError, match=message):
        Corpus.from_ids([5, 6, 7, 8], answers=mask)
