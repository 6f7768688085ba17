"""Build tiny models and tokenizers that need no files and no network."""

from __future__ import annotations

import zlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models import llama

from metalens import TunedLens

VOCAB, DIM, LAYERS = 100, 32, 3


class Block(nn.Module):
    """A block that takes x and no other argument. Each position sees the mean of the positions up to it, so order and context matter."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def __call__(self, x):
        context = mx.cumsum(x, axis=1) / mx.arange(1, x.shape[1] + 1)[None, :, None]
        return x + self.down(mx.tanh(self.up(self.norm(context))))


class MockModel(nn.Module):
    """A model with embed_tokens, layers, norm and an unquantized lm_head with a bias, all at the top level."""

    def __init__(self, vocab: int = VOCAB, dim: int = DIM, layers: int = LAYERS, seed: int = 0, block: type[nn.Module] = Block):
        super().__init__()
        mx.random.seed(seed)  # MLX's layers draw their own initial values
        self.embed_tokens = nn.Embedding(vocab, dim)
        self.layers = [block(dim) for _ in range(layers)]
        self.norm = nn.RMSNorm(dim)
        self.lm_head = nn.Linear(dim, vocab, bias=True)
        randomize(self, seed)

    def __call__(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class WordTokenizer:
    """A tokenizer with one id per word, below `vocab_size`: 'w17' is 17, other words are hashed. There are no special tokens."""

    bos_token_id = 0

    def __init__(self, vocab_size: int = VOCAB):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [self._id(word) for word in text.split()]

    def decode(self, ids) -> str:
        return " ".join(f"w{int(i)}" for i in ids)

    def _id(self, word: str) -> int:
        return int(word[1:]) if word[:1] == "w" and word[1:].isdigit() else zlib.crc32(word.encode()) % self.vocab_size


class CountingTokenizer(WordTokenizer):
    """A tokenizer that numbers the words of each text 0, 1, 2, ..., past the end of a small vocabulary."""

    def encode(self, text: str) -> list[int]:
        return list(range(len(text.split())))


def randomize(model: nn.Module, seed: int = 0, size: float = 0.3) -> nn.Module:
    """Move every float parameter away from its initial value, so that no norm, scale or bias is the identity by chance."""
    rng = np.random.default_rng(seed)

    def moved(p: Any) -> Any:
        return p + mx.array(rng.normal(0, size, p.shape).astype(np.float32)).astype(p.dtype) if mx.issubdtype(p.dtype, mx.floating) else p

    model.update(tree_map(moved, model.parameters()))
    return model


def tiny_llama(vocab: int = 96, dim: int = 64, layers: int = 2, tied: bool = False, seed: int = 0) -> llama.Model:
    """Return a llama of mlx-lm that runs in milliseconds and whose hidden size can be quantized."""
    mx.random.seed(seed)
    return randomize(llama.Model(llama.ModelArgs(**llama_config(vocab, dim, layers, tied))), seed, size=0.1)


def llama_config(vocab: int = 96, dim: int = 64, layers: int = 2, tied: bool = False) -> dict[str, Any]:
    """Return the config.json of `tiny_llama`."""
    return {
        "model_type": "llama",
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * dim,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


def float64_logits(model: MockModel, ids: np.ndarray) -> list[np.ndarray]:
    """Return the logits [T, V] after every block of a MockModel for ids [T], in float64 NumPy."""

    def value(p: mx.array) -> np.ndarray:
        return np.array(p).astype(np.float64)

    def rms(norm: nn.RMSNorm, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + norm.eps) * value(norm.weight)

    x = value(model.embed_tokens.weight)[ids]
    logits = []
    for block in model.layers:
        context = np.cumsum(x, axis=0) / np.arange(1, len(x) + 1)[:, None]
        x = x + np.tanh(rms(block.norm, context) @ value(block.up.weight).T + value(block.up.bias)) @ value(block.down.weight).T
        logits.append(rms(model.norm, x) @ value(model.lm_head.weight).T + value(model.lm_head.bias))
    return logits


def random_lens(seed=0):
    """Return a lens far from the identity, for a MockModel."""
    lens = TunedLens(LAYERS, DIM)
    rng = np.random.default_rng(seed)
    for translator in lens.translators:
        translator.weight = translator.weight + mx.array(rng.normal(0, 0.3, (DIM, DIM)).astype(np.float32))
        translator.bias = mx.array(rng.normal(0, 0.3, DIM).astype(np.float32))
    return lens


def assert_close(found, expected, tolerance=1e-4):
    """Check that predictions are equal, up to rounding of the scores."""
    assert list(found) == list(expected)
    for layer, positions in expected.items():
        assert len(found[layer]) == len(positions)
        for a, b in zip(found[layer], positions, strict=True):
            assert [(i, text) for i, _, text in a] == [(i, text) for i, _, text in b]
            np.testing.assert_allclose([z for _, z, _ in a], [z for _, z, _ in b], rtol=tolerance, atol=tolerance)
