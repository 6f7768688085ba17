"""Different tokens have different texts, and no id is an exception."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from metalens import InterpretableModel
from metalens.models.bundled import MODEL
from metalens.models.token_text import token_text
from support.bos import bos_tokenizer
from support.mocks import tiny_llama


@pytest.fixture(scope="module")
def demo():
    return load_tokenizer(MODEL)._tokenizer


def test_parts_of_characters_are_spelled_as_bytes(demo):
    text = "日本語 é 😀 dog"
    ids = demo.encode(text)
    found = [token_text(demo, i) for i in ids]
    assert len(set(found)) == len(set(ids))
    assert "\ufffd" not in "".join(found)
    spelled = "".join(f"<0x{byte:02X}>" for byte in "日".encode())
    assert "".join(found).startswith(spelled)


def test_every_token_of_a_vocabulary_has_a_text_of_its_own(demo):
    texts = [token_text(demo, i) for i in range(len(demo))]
    assert len(set(texts)) == len(texts)
    assert all(texts)


def sentencepiece():
    """A tokenizer like Llama 2's: its decoder drops the space at the start of a text; it has byte pieces."""
    words = {"<unk>": 0, "<0xE6>": 1, "<0x97>": 2, "▁dog": 3, "dog": 4, "▁": 5, "▁▁": 6, "é": 7}
    backend = Tokenizer(models.BPE(words, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_sentencepiece_keeps_its_spaces_and_bytes():
    tokenizer = sentencepiece()
    assert tokenizer.decode([3]) == tokenizer.decode([4]) == "dog"
    assert [token_text(tokenizer, i) for i in range(8)] == ["<unk>", "<0xE6>", "<0x97>", " dog", "dog", " ", "  ", "é"]


def refuse(error):
    def decode(ids):
        raise error

    return decode


DECODERS = {
    "IndexError": refuse(IndexError("piece id is out of range.")),
    "KeyError": refuse(KeyError(310)),
    "None": lambda ids: None,
    "an empty text": lambda ids: "",
}


@pytest.mark.parametrize("decode", DECODERS.values(), ids=DECODERS)
def test_an_id_beyond_the_tokenizer_is_shown_as_its_number(decode):
    """The heads of many models have more rows than their tokenizers have tokens, and early layers predict those rows."""
    known = SimpleNamespace(encode=lambda text: [1], decode=lambda ids: f"w{ids[0]}" if ids[0] < 5 else decode(ids))
    model = InterpretableModel(tiny_llama(), known)
    found = model.logit_lens([1, 2], top_k=96)
    texts = {i: text for i, _, text in found[0][0]}
    assert texts == {i: f"w{i}" if i < 5 else f"<{i}>" for i in range(96)}
    assert model.read([1, 2]).model_tokens


def test_a_fast_tokenizer_smaller_than_the_head():
    llama = tiny_llama(vocab=120)
    llama.lm_head.weight = mx.concatenate([mx.zeros((100, 64)), mx.ones((20, 64))])
    assert isinstance(llama.lm_head, nn.Linear)
    model = InterpretableModel(llama, bos_tokenizer())
    assert {text for position in model.logit_lens([5, 6], top_k=120)[0] for i, _, text in position if i >= 96} == {f"<{i}>" for i in range(96, 120)}
