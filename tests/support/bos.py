"""A tokenizer that puts a beginning-of-sequence token before every text and has a chat template, and a tiny model of mlx-lm with it."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from support.mocks import llama_config, tiny_llama

BOS, EOS, USER, ASSISTANT, VOCAB = 0, 1, 3, 4, 96
SPECIAL = ["<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>"]
TEMPLATE = "<s>{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def bos_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a fast tokenizer of words: 'w17' is 17, special tokens are 0 to 4."""
    words = {token: i for i, token in enumerate(SPECIAL)} | {f"w{i}": i for i in range(len(SPECIAL), VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    found = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=64)
    found.chat_template = template
    return found


def save_bos_model(folder: Path) -> Path:
    """Write a tiny llama with this tokenizer as mlx-lm reads it, and return the folder."""
    folder.mkdir(parents=True)
    bos_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**llama_config(VOCAB), "max_position_embeddings": 512}))
    weights = dict(tree_flatten(tiny_llama(VOCAB).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def words(ids: list[int]) -> str:
    """Return the text of ids."""
    return " ".join(SPECIAL[i] if i < len(SPECIAL) else f"w{i}" for i in ids)
