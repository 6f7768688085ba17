"""Tokenizers that are rebuilt from the metadata of a GGUF file, beside the originals."""

import io

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer
from transformers import AutoTokenizer

from metalens.models.bundled import HELD_OUT_TEXT, MODEL
from metalens.models.gguf.header import Metadata
from metalens.models.gguf.tokenizer import WORDS, write_tokenizer
from support.gguf_files import tokenizer_metadata

TEXT = (
    "It's 1984: we've 3 cats,\n\n  two dogs\tand a naïve café … 日本語 🙂 DON'T  \r\n camelCase x=10_000; " + HELD_OUT_TEXT.read_text("utf-8")[:2000]
)


def rebuilt(folder, metadata):
    """Return the tokenizer of a file with this metadata, as Transformers opens it."""
    found = Metadata({"general.architecture": "llama", **metadata})
    found.path = folder / "model.gguf"
    write_tokenizer(found, folder, 512)
    return AutoTokenizer.from_pretrained(folder)


def test_a_byte_level_tokenizer_is_the_original(tmp_path):
    original = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found = rebuilt(tmp_path, {**tokenizer_metadata(original, "gpt-2"), "tokenizer.chat_template": template})
    for text in (TEXT, "", " ", "<|endoftext|>a<|endoftext|>"):
        assert found.encode(text) == original.encode(text).ids
        assert found.decode(found.encode(text)) == original.decode(original.encode(text).ids, skip_special_tokens=False)
    assert (found.eos_token, found.eos_token_id) == ("<|endoftext|>", 0)
    assert found.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-4o", "smollm"])
def test_the_ways_to_split_words(tmp_path, pre):
    """Digits, capitals and contractions are split as the named tokenizer does; the expected words were written by hand."""
    original = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    found = rebuilt(tmp_path, tokenizer_metadata(original, pre)).backend_tokenizer.pre_tokenizer
    words = [word.replace("Ġ", " ") for word, _ in found.pre_tokenize_str("It's 12345 camelCase, DON'T")]
    assert (
        words
        == {
            "llama-bpe": ["It", "'s", " ", "123", "45", " camelCase", ",", " DON", "'T"],
            "qwen2": ["It", "'s", " ", "1", "2", "3", "4", "5", " camelCase", ",", " DON", "'T"],
            "tekken": ["It", "'s", " ", "1", "2", "3", "4", "5", " camel", "Case", ",", " DON", "'T"],
            "gpt-4o": ["It's", " ", "123", "45", " camel", "Case", ",", " DON'T"],
            "smollm": ["It", "'s", " ", "1", "2", "3", "4", "5", " camelCase", ",", " DON", "'", "T"],
        }[pre]
    )


def test_known_patterns():
    """The patterns for Llama 3 and Qwen 2 are those of Transformers."""
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert WORDS["qwen2"] == PRETOKENIZE_REGEX
    assert WORDS["llama-bpe"] == PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    for pattern in set(WORDS.values()) - {"gpt2", "digits"}:
        Regex(pattern)


@pytest.mark.parametrize("space", [True, False], ids=["space before a text", "no space before a text"])
def test_a_sentencepiece_tokenizer_is_the_original(tmp_path, space):
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(HELD_OUT_TEXT.read_text("utf-8")[:40000].splitlines()),
        **{"model_writer": content, "vocab_size": 700, "model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": space},
        **{
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "user_defined_symbols": ["<tag>"] if space else ["\n\n", "▁▁", "▁▁▁"],
        },
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())
    ids = range(original.get_piece_size())

    def kind(i):
        if original.is_unknown(i) or original.is_control(i):
            return 2 if original.is_unknown(i) else 3
        return 6 if original.is_byte(i) else 4 if original.id_to_piece(i) in ("<tag>", "\n\n", "▁▁", "▁▁▁") else 1

    found = rebuilt(
        tmp_path,
        {
            "tokenizer.ggml.model": "llama",
            # llama.cpp writes the spaces of such tokens as spaces.
            "tokenizer.ggml.tokens": [original.id_to_piece(i).replace("▁", " " if kind(i) == 4 else "▁") for i in ids],
            "tokenizer.ggml.scores": [original.get_score(i) for i in ids],
            "tokenizer.ggml.token_type": [kind(i) for i in ids],
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_space_prefix": space,
        },
    )
    texts = [TEXT.replace("  ", " ") if space else TEXT, "word", " word", "tab\there", "a\n\nb", *([] if space else ["a  b   c    d", "  indented"])]
    for text in texts:
        assert found.encode(text) == [1, *original.encode(text)], text
        assert found.decode(found.encode(text), skip_special_tokens=True) == original.decode(original.encode(text))
