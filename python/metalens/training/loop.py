"""The training loop."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import cast

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from metalens.arrays import nested, number
from metalens.lens import TunedLens
from metalens.progress import token_bar
from metalens.stream import StreamSource
from metalens.training.config import TrainingConfig
from metalens.training.data import TokenSequences
from metalens.training.step import Gradient, loss_and_gradient
from metalens.unembed import Unembed

log = logging.getLogger(__name__)

# Short sequences go through the model together, up to so many tokens: enough rows for the kernels to pay, and less memory than one long sequence.
PASS_TOKENS = 512


@dataclass(frozen=True)
class Progress:
    """One step, as callbacks see it. Losses are from before the update, in nats per token.

    Attributes:
        step: counted from 0.
        loss: mean over layers.
        losses: one per layer.
        tokens: seen so far, this step's included.
    """

    step: int
    loss: float
    losses: list[float]
    tokens: int


def train(
    source: StreamSource,
    unembed: Unembed,
    ids: mx.array,
    config: TrainingConfig,
    *,
    callback: Callable[[Progress], None] | None = None,
    show_progress: bool = False,
) -> TunedLens:
    """Train a lens to predict, from every block's output, what the model itself will predict: mean KL(model || lens) over layers and tokens.

    A step whose loss or gradient is not finite is skipped with a warning; the lens and the momentum stay as they were.

    Args:
        source: the model's residual streams.
        unembed: its norm and head.
        ids: [tokens] training text.
        config: the settings.
        callback: called after every step.
        show_progress: a progress bar on stderr with tokens/s and the time left.

    Raises:
        ValueError: if the text is shorter than one sequence.
    """
    sequences = iter(TokenSequences(ids, config.max_seq_len, config.seed))
    lens = TunedLens(len(source), unembed.hidden_dim)
    optimizer = optim.SGD(learning_rate=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0)
    tokens_per_step = config.sequences_per_step * config.max_seq_len
    with token_bar(config.num_steps * tokens_per_step, "training the lens", show_progress) as bar:
        for step in range(config.num_steps):
            losses, gradient = _accumulate(lens, source, unembed, list(islice(sequences, config.sequences_per_step)))
            norm = gradient_norm(gradient)
            if math.isfinite(norm) and all(map(math.isfinite, losses)):
                scale = min(1.0, config.gradient_clip / (norm + 1e-6))
                optimizer.learning_rate = config.learning_rate_at(step)
                optimizer.update(lens, tree_map(lambda g, s=scale: g * s, gradient))
                mx.eval(lens.state, optimizer.state)
            else:
                warnings.warn(
                    f"Step {step} has a loss or gradient that is not finite; it is skipped and the lens left as it was. "
                    "If this happens often, look for token ids outside the vocabulary or damaged weights.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            loss = math.fsum(losses) / len(losses)
            bar.set_postfix(step=f"{step + 1}/{config.num_steps}", KL=f"{loss:.3f}", refresh=False)
            bar.update(tokens_per_step)
            log.debug("step %d loss %.4f gradient norm %.4f", step, loss, norm)
            if callback is not None:
                callback(Progress(step, loss, losses, (step + 1) * tokens_per_step))
    return lens


def _accumulate(lens: TunedLens, source: StreamSource, unembed: Unembed, sequences: list[mx.array]) -> tuple[list[float], Gradient]:
    """Mean losses and gradient over the sequences of one step, a pass's worth of them in memory at a time."""
    total: Gradient | None = None
    losses = mx.zeros((lens.num_layers,))
    together = max(1, PASS_TOKENS // sequences[0].size)
    for start in range(0, len(sequences), together):
        batch = mx.concatenate(sequences[start : start + together])
        share = batch.shape[0] / len(sequences)
        loss, gradient = loss_and_gradient(lens, source.capture(batch), unembed)
        losses = losses + loss * share
        scaled = tree_map(lambda g, s=share: g * s, gradient)
        total = scaled if total is None else tree_map(mx.add, total, scaled)
        mx.eval(losses, total)
    assert total is not None
    return nested(losses), total


def gradient_norm(gradient: Gradient) -> float:
    """The Euclidean norm over all layers together."""
    return math.sqrt(math.fsum(number(mx.sum(mx.square(g))) for _, g in cast("list[tuple[str, mx.array]]", tree_flatten(gradient))))
