"""How fast a lens could be at most on Apple GPUs: a model from counted work and published numbers, not a measurement.

A kernel takes at least the longer of two times: its operations at the rate of the chip's matrix instructions, and its bytes at the bandwidth of the
memory. Kernels follow each other, so their times add up. kernel_model.py beside it predicts what part of that rate the kernels reach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from metalens.estimate.chips import Chip
from metalens.models.facts import ModelDimensions
from metalens.ops.metal import cost
from metalens.ops.metal.cost import Cost
from metalens.training.vocabulary import PIECE, sample_size

WHAT = "A model from counted work and published numbers of the chips, not a measurement: nothing was run on Apple hardware."


@dataclass(frozen=True)
class Bounds:
    """Tokens per second that one chip can reach at most, for all layers of a model.

    Attributes:
        statistics: statistics of the lens on metalens's kernels.
        statistics_plain_mlx: statistics of the lens in plain MLX.
        training: loss and gradient of the lens on metalens's kernels.
        training_plain_mlx: loss and gradient of the lens in plain MLX, in float32 (MLX_ENABLE_TF32=0 on an M5).
        training_in_16_bits: loss and gradient with 16-bit operands of products, on matrix units if there are any.
        forward: forward pass of the model.
        training_and_forward: training on metalens's kernels together with the forward pass.
        sampled_training: training with a sampled vocabulary (`vocabulary="sampled"`).
        sampled_training_and_forward: the same together with the forward pass.
    """

    statistics: float
    statistics_plain_mlx: float
    training: float
    training_plain_mlx: float
    training_in_16_bits: float
    forward: float
    training_and_forward: float
    sampled_training: float
    sampled_training_and_forward: float


# Bytes per logit that plain MLX moves when it is written well: float32 logits of a batch of all layers, with reductions and element-wise kernels that
# do not fuse with each other. Each number counts arrays of the logits' size that are read or written.
PLAIN_STATS = 4 * (1 + 1 + 2 * (2 + 1 + 1) + 2)  # write; lse; entropy and KL (read two, write terms, reduce); top-k (read, write)
PLAIN_TRAINING = 4 * (1 + 1 + (2 + 1 + 1) + (2 + 1) + 1)  # write; lse; KL; q - p (read two, write); the second product reads it

CHUNK = 16  # tokens of a chunk with all layers; another number hardly changes the time


def bounds(model: ModelDimensions, chip: Chip, tokens: int) -> Bounds:
    """Compute how many tokens per second a chip can reach at most.

    Args:
        model: sizes of the model.
        chip: numbers of the chip.
        tokens: tokens of a batch.
    """
    head_bytes, layers, hidden_size = model.head_bytes, model.num_layers, model.hidden_size
    stats = cost.lens_stats(layers, tokens, model.vocab_size, hidden_size, head_bytes, True, chip.family)
    forward = chip.seconds(Cost(0, 2 * tokens * model.block_params, model.block_params * model.bits // 8), in_16_bits=True)
    translators = _translator_seconds(model, chip, tokens)
    training = _in_chunks(tokens, lambda n: _loss_seconds(model, chip, n)) + translators
    sampled = _sampled_loss_seconds(model, chip, tokens) + translators
    plain_stats = _in_chunks(tokens, lambda n: _plain_seconds(model, chip, n, 1, PLAIN_STATS))
    plain_training = _in_chunks(tokens, lambda n: _plain_seconds(model, chip, n, 2, PLAIN_TRAINING))
    return Bounds(
        statistics=tokens / chip.seconds(stats),
        statistics_plain_mlx=tokens / plain_stats,
        training=tokens / training,
        training_plain_mlx=tokens / (plain_training + _plain_translator_seconds(model, chip, tokens)),
        training_in_16_bits=tokens / (_in_chunks(tokens, lambda n: _loss_seconds(model, chip, n, in_16_bits=True)) + translators),
        forward=tokens / forward,
        training_and_forward=tokens / (training + forward),
        sampled_training=tokens / sampled,
        sampled_training_and_forward=tokens / (sampled + forward),
    )


def _in_chunks(tokens: int, seconds_of: Callable[[int], float]) -> float:
    return -(-tokens // CHUNK) * seconds_of(min(CHUNK, tokens))


def _sampled_loss_seconds(model: ModelDimensions, chip: Chip, tokens: int) -> float:
    """Return the seconds of the loss on samples: the ids that the model expects, and for every piece the gathered rows and the loss on them."""
    size = sample_size("sampled", model.vocab_size)
    if size is None:
        return _in_chunks(tokens, lambda n: _loss_seconds(model, chip, n))
    sample = replace(model, vocab_size=size)
    expected = cost.lens_stats(1, tokens, model.vocab_size, model.hidden_size, model.head_bytes, False, chip.family)
    gathered = Cost(0, 0, 2 * sample.head_bytes)  # read and written
    loss = _in_chunks(tokens, lambda n: _loss_seconds(sample, chip, n, with_offset=True))
    return chip.seconds(expected) + -(-tokens // PIECE) * chip.seconds(gathered) + loss


def _loss_seconds(model: ModelDimensions, chip: Chip, tokens: int, with_offset: bool = False, in_16_bits: bool = False) -> float:
    """Return the seconds of the kernels of one chunk of the loss, one after the other."""
    rows, vocab, depth = model.num_layers * tokens, model.vocab_size, model.hidden_size  # D is what the head's product sums over
    head, family = model.head_bytes, chip.family
    gradient_bytes = 2 if in_16_bits and not chip.matrix_tflops else 4  # matrix units take float32
    kernels = [
        cost.lens_stats(1, tokens, vocab, depth, head, False, family, with_offset),  # the target
        cost.linear(tokens, vocab, depth, head, family),
        cost.linear(rows, vocab, depth, head, family),
        cost.softmax_grad(rows, tokens, vocab, gradient_bytes, with_offset),
        cost.lens_backward(rows, vocab, depth, head, gradient_bytes, family),
    ]
    return sum(chip.seconds(kernel, in_16_bits) for kernel in kernels)


def _translator_seconds(model: ModelDimensions, chip: Chip, tokens: int) -> float:
    return model.num_layers * chip.seconds(cost.translate_norm(tokens, model.hidden_size, chip.family))


def _plain_translator_seconds(model: ModelDimensions, chip: Chip, tokens: int) -> float:
    """Return the seconds of three products of each translator, and of the bytes of 14 float32 arrays [tokens, D] and four [D, D]."""
    d = model.hidden_size
    return model.num_layers * chip.seconds(Cost(0, 6 * tokens * d**2, 4 * tokens * d * 14 + 16 * d**2))


def _plain_seconds(model: ModelDimensions, chip: Chip, tokens: int, products: int, bytes_per_logit: int) -> float:
    """Return the seconds of the head's products, without padding, and of the other kernels, which are bound by their bytes."""
    rows = model.num_layers * tokens
    product = Cost(0, 2 * (rows + tokens) * model.vocab_size * model.hidden_size, model.head_bytes)
    return products * chip.seconds(product) + chip.seconds(Cost(0, 0, rows * model.vocab_size * bytes_per_logit))
