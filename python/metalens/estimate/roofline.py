"""How fast a lens could run on a chip at most: a model from counted work and published numbers, not a measurement.

The bound of a kernel is the longer of two times: its operations at the rate of the chip's matrix instructions, its bytes at the memory's bandwidth.
Kernels follow each other, so their times add up.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalens.ops.metal import cost
from metalens.ops.metal.cost import Cost
from metalens.ops.metal.tuning import GENERATIONS, GpuGeneration
from metalens.utils.errors import InvalidValueError

WHAT = "A model from counted work and published numbers of the chips, not a measurement: nothing was run on Apple hardware."


@dataclass(frozen=True)
class Chip:
    """Published numbers of a GPU.

    Attributes:
        generation: 13 for M1.
        tflops: float32, all cores.
        bandwidth: of the memory, GB/s.
        source: who published them.
    """

    generation: int
    tflops: float
    bandwidth: float
    source: str

    @property
    def family(self) -> GpuGeneration:
        """How it is tuned for."""
        return GENERATIONS[self.generation]

    @property
    def matrix_flops(self) -> float:
        """Operations per second of simdgroup matrices: 102 of 128 FMAs per core and clock, for half and float alike, as others measured on M1."""
        return self.tflops * 1e12 * 102 / 128

    def seconds(self, work: Cost) -> float:
        """At least so long."""
        return max(work.flops / self.matrix_flops, work.bytes / (self.bandwidth * 1e9))


CHIPS = {
    "M1": Chip(13, 2.62, 68, "metal-benchmarks, 8 cores"),
    "M1-Max": Chip(13, 10.6, 400, "metal-benchmarks, 32 cores"),
    "M2": Chip(14, 3.58, 100, "Apple, 10 cores"),
    "M2-Max": Chip(14, 13.6, 400, "half of M2-Ultra"),
    "M2-Ultra": Chip(14, 27.2, 800, "Apple, 76 cores"),
    "M3-Max": Chip(15, 14.3, 400, "hmc-tech, 40 cores at 1.4 GHz"),
    "M4": Chip(16, 3.76, 120, "hmc-tech, 10 cores"),
    "M4-Max": Chip(16, 17.2, 546, "hmc-tech and Apple, 40 cores"),
    "M5": Chip(17, 4.15, 153.6, "published rooflines, 10 cores, without the matrix units"),
    "M5-Max": Chip(17, 18.0, 614, "published estimates, 40 cores, without the matrix units"),
}


@dataclass(frozen=True)
class Dimensions:
    """What of a model decides the cost of its lens.

    Attributes:
        layers: L.
        depth: D.
        vocab: V.
        bits, group_size: of the head's quantization; 16 and 0 for a dense one.
        body: parameters of the blocks that a token's forward pass multiplies with.
    """

    layers: int
    depth: int
    vocab: int
    bits: int
    group_size: int
    body: int

    @property
    def head_bytes(self) -> int:
        """Of U, with a 16-bit scale and bias for each group."""
        return cost.weight_bytes(self.vocab, self.depth, self.bits, self.group_size, 4)


def _llama(layers: int, depth: int, intermediate: int, key_value: int, vocab: int = 128256) -> Dimensions:
    body = layers * depth * (2 * depth + 2 * key_value + 3 * intermediate)
    return Dimensions(layers, depth, vocab, 4, 64, body)


MODELS = {
    "Llama-3.2-1B-4bit": _llama(16, 2048, 8192, 512),
    "Llama-3.1-8B-4bit": _llama(32, 4096, 14336, 1024),
    "Llama-3.1-70B-4bit": _llama(80, 8192, 28672, 1024),
}


def dimensions(model: str) -> Dimensions:
    """Of a name in MODELS, or of a folder with a config.json; no weights are read.

    Raises:
        ValueError: if it is neither, or the configuration does not say what is needed.
    """
    if model in MODELS:
        return MODELS[model]
    path = Path(model) / "config.json"
    if not path.exists():
        raise InvalidValueError(f"{model!r} is no folder with a config.json and none of {', '.join(MODELS)}.")
    config: dict[str, Any] = json.loads(path.read_text())
    config = {**config, **config.get("text_config", {})}
    try:
        layers, depth, vocab = int(config["num_hidden_layers"]), int(config["hidden_size"]), int(config["vocab_size"])
    except KeyError as error:
        raise InvalidValueError(f"{path} does not say {error}: a roofline needs num_hidden_layers, hidden_size and vocab_size.") from error
    quantization = config.get("quantization") or {}
    heads = int(config.get("num_attention_heads", 1))
    key_value = int(config.get("num_key_value_heads") or heads) * int(config.get("head_dim") or depth // heads)
    body = layers * depth * (2 * depth + 2 * key_value + 3 * int(config.get("intermediate_size", 4 * depth)))
    return Dimensions(layers, depth, vocab, int(quantization.get("bits", 16)), int(quantization.get("group_size", 0)), body)


# Bytes per logit that plain MLX moves when written well: float32 logits of a batch of all layers, reductions and element-wise kernels that do not
# fuse with each other. Each entry is one array of the logits' size, read or written.
PLAIN_STATS = 4 * (1 + 1 + 2 * (2 + 1 + 1) + 2)  # write; lse; entropy and KL (read two, write terms, reduce); top-k (read, write)
PLAIN_TRAINING = 4 * (1 + 1 + (2 + 1 + 1) + (2 + 1) + 1)  # write; lse; KL; q - p (read two, write); the second product reads it


def _plain(d: Dimensions, chip: Chip, tokens: int, products: int, per_logit: int) -> float:
    """Seconds of the products, without any padding, and then of the other kernels, which are bound by their bytes."""
    rows = d.layers * tokens
    product = Cost(0, 2 * (rows + tokens) * d.vocab * d.depth, d.head_bytes)
    return products * chip.seconds(product) + chip.seconds(Cost(0, 0, rows * d.vocab * per_logit))


def bounds(d: Dimensions, chip: Chip, tokens: int) -> dict[str, float]:
    """Tokens per second at most, for a batch of so many tokens and all layers.

    Returns:
        {task and path: tokens/s}: 'statistics' and 'training' of the lens alone, through metalens and through plain MLX; the model's own forward
        pass; and training with it.
    """
    family = chip.family
    translators = d.layers * chip.seconds(cost.translate_norm(tokens, d.depth, family))
    plain_translators = d.layers * chip.seconds(Cost(0, 6 * tokens * d.depth**2, 4 * tokens * d.depth * 14 + 16 * d.depth**2))
    forward = chip.seconds(Cost(0, 2 * tokens * d.body, d.body * d.bits // 8))

    def in_chunks(seconds_of: Callable[[int], float]) -> float:
        # Chunks of 16 tokens with all layers: what a chunk holds hardly changes the time.
        return -(-tokens // 16) * seconds_of(min(16, tokens))

    training = in_chunks(lambda n: _sequence(d, chip, n)) + translators
    plain_training = in_chunks(lambda n: _plain(d, chip, n, 2, PLAIN_TRAINING)) + plain_translators
    times = {
        "statistics, metalens": chip.seconds(cost.lens_stats(d.layers, tokens, d.vocab, d.depth, d.head_bytes, True, family)),
        "statistics, plain MLX": in_chunks(lambda n: _plain(d, chip, n, 1, PLAIN_STATS)),
        "training, metalens": training,
        "training, plain MLX": plain_training,
        "the model's forward pass": forward,
        "training and forward, metalens": training + forward,
    }
    return {name: tokens / seconds for name, seconds in times.items()}


def _sequence(d: Dimensions, chip: Chip, tokens: int) -> float:
    """Seconds of the kernels of one chunk of the loss, one after the other."""
    rows, family = d.layers * tokens, chip.family
    target = cost.lens_stats(1, tokens, d.vocab, d.depth, d.head_bytes, False, family)
    kernels = [
        target,
        cost.linear(tokens, d.vocab, d.depth, d.head_bytes, family),
        cost.linear(rows, d.vocab, d.depth, d.head_bytes, family),
        cost.softmax_grad(rows, tokens, d.vocab, 4),
        cost.lens_backward(rows, d.vocab, d.depth, d.head_bytes, 4, family),
    ]
    return sum(chip.seconds(kernel) for kernel in kernels)
