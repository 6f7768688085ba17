"""Iterative inference: whether what a block adds to the residual stream goes down the gradient of a loss (Belrose et al. 2023, figure 19).

The cosine of (output - input) of block l and of the gradient of the next token's cross-entropy at its input:

    of="lens"    the loss of a lens that reads the block's input. With the logit lens this is tuned-lens's v0.0.3.
    of="model"   the loss of the model, through all blocks that follow. The gradient at a position is that of the losses at it and after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np

from metalens.analysis.resampling import Interval, bootstrap_mean
from metalens.analysis.sequences import sequences_of
from metalens.evaluation.text import EvaluationText
from metalens.lenses.lens import Lens, as_lens
from metalens.lenses.provenance import check_lens
from metalens.models.capture import Edit
from metalens.models.language_model import LanguageModel
from metalens.models.layers import EMBEDDING
from metalens.models.rewiring import edited_input
from metalens.ops import Head
from metalens.ops.chunks import in_chunks
from metalens.ops.logits import capped_logits, head_vjp, with_offset
from metalens.readings.rows import apply_lens
from metalens.utils.errors import InvalidValueError
from metalens.utils.progress_bar import token_bar


@dataclass(frozen=True)
class GradientAlignment:
    """The alignment of one block's contribution with the gradient at its input. Intervals are bootstraps over sequences.

    Attributes:
        layer: the block.
        cosine: mean cosine over positions with a next token. Below 0, the block lowers the loss.
        negative: fraction of these positions whose cosine is below 0.
        sequence_cosine: mean over sequences of the cosine of all their positions as one vector, as tuned-lens's v0.0.3 has it.
    """

    layer: int
    cosine: Interval
    negative: Interval
    sequence_cosine: Interval


def gradient_alignment(
    model: LanguageModel,
    text: EvaluationText,
    lens: Lens | str | Path | None = None,
    *,
    of: Literal["lens", "model"] = "lens",
    max_seq_len: int | None = None,
    max_tokens: int | None = None,
    bos: bool = True,
    resamples: int = 1000,
    seed: int = 0,
    show_progress: bool = False,
) -> list[GradientAlignment]:
    """Measure the cosine of every block's contribution and the gradient of the cross-entropy at its input.

    Args:
        model: the model.
        text: as in `metalens.evaluate`.
        lens: the lens of of="lens". Its translator of block l - 1 reads the input of block l; the embedding's, if it has one, that of
            block 0. None = the logit lens.
        of: the loss.
        max_seq_len, max_tokens, bos: as in `metalens.analysis.sequences_of`.
        resamples: resamples of the bootstrap.
        seed: seed of the bootstrap.
        show_progress: show a progress bar on stderr.

    Returns:
        one entry for each block.

    Raises:
        InvalidValueError: for an empty text, one without a next token, or a lens of another model.
    """
    the_lens = as_lens(lens)
    check_lens(the_lens, model)
    sequences = [ids for ids in sequences_of(model, text, max_seq_len=max_seq_len, max_tokens=max_tokens, bos=bos) if ids.size > 1]
    if not sequences:
        raise InvalidValueError("No sequence of the text has a next token. Give a longer text.")
    found = []
    with token_bar(sum(ids.size for ids in sequences), "differentiating", show_progress) as bar:
        for ids in sequences:
            gradients = _lens_gradients(model, ids, the_lens) if of == "lens" else _model_gradients(model, ids)
            found.append(_cosines(_updates(model, ids), gradients))
            bar.update(ids.size)
    sizes = np.array([ids.size - 1 for ids in sequences])
    alignments = []
    for layer in range(model.num_layers):
        columns = np.array([[float(values[layer]) for values in each] for each in found]).T
        means = [bootstrap_mean(column, w, resamples=resamples, seed=seed) for column, w in zip(columns, (sizes, sizes, None), strict=True)]
        alignments.append(GradientAlignment(layer, *means))
    return alignments


def _inputs(model: LanguageModel, ids: mx.array) -> tuple[list[mx.array], mx.array]:
    """Return the input of every block [T, D], and the output of the last one, in float32."""
    states = model.source.capture(ids[None], with_embedding=True)
    assert states.embedding is not None
    stream = [h[0].astype(mx.float32) for h in (states.embedding, *states.hidden)]
    mx.eval(stream)
    return stream[:-1], stream[-1]


def _updates(model: LanguageModel, ids: mx.array) -> list[np.ndarray]:
    """Return what every block adds at the positions with a next token, [T - 1, D] float64."""
    inputs, last = _inputs(model, ids)
    stream = [np.array(h).astype(np.float64)[:-1] for h in (*inputs, last)]
    return [after - before for before, after in pairwise(stream)]


def _lens_gradients(model: LanguageModel, ids: mx.array, lens: Lens) -> list[np.ndarray]:
    """Return the gradient [T - 1, D] of the lens's own cross-entropy at the input of every block."""
    unembed, gradients = model.unembed, []
    for layer, h in enumerate(_inputs(model, ids)[0]):

        def rows(h: mx.array, layer: int = layer) -> mx.array:
            return unembed.norm(apply_lens(lens, h, layer - 1 if layer else EMBEDDING)).astype(mx.float32)

        dn = cross_entropy_gradient(rows(h[:-1]), ids[1:], unembed.head)
        gradients.append(np.array(mx.vjp(rows, [h[:-1]], [dn])[1][0]).astype(np.float64))
    return gradients


def _model_gradients(model: LanguageModel, ids: mx.array) -> list[np.ndarray]:
    """Return the gradient [T - 1, D] of the sum of the model's cross-entropies at the input of every block."""
    inputs, last = _inputs(model, ids)
    unembed, source = model.unembed, model.source
    dn = cross_entropy_gradient(unembed.norm(last[:-1]).astype(mx.float32), ids[1:], unembed.head)

    def rows(*shifts: mx.array) -> list[mx.array]:
        # A shift of the input of block l is one of the output of block l - 1; that of block 0 is one of the embedding's output. What a
        # capture returns has no gradient, so the last output is taken on its way.
        taken: list[mx.array] = []
        edits: dict[int, Edit] = {layer: _adding(shift) for layer, shift in enumerate(shifts[1:])}
        edits[len(shifts) - 1] = lambda h: taken.append(h) or h  # type: ignore[func-returns-value]
        with edited_input(source.layers[0], _adding(shifts[0])):
            source.capture(ids[None], edits)
        return [unembed.norm(taken[0][0, :-1]).astype(mx.float32)]

    shifts = [mx.zeros_like(h) for h in inputs]
    gradients = mx.vjp(rows, shifts, [dn])[1]
    return [np.array(g).astype(np.float64)[:-1] for g in gradients]


def _adding(shift: mx.array) -> Edit:
    return lambda h: h + shift.astype(h.dtype)


def cross_entropy_gradient(n: mx.array, labels: mx.array, head: Head) -> mx.array:
    """Compute the gradient of the sum of -log p(label) at every row, a chunk of rows at a time. Lazy.

    Args:
        n: [N, D] rows after the final norm.
        labels: [N] token ids.
        head: the unembedding.

    Returns:
        [N, D] float32.
    """

    def chunk(n: mx.array, labels: mx.array) -> list[mx.array]:
        z = capped_logits(n, head)
        p = mx.softmax(with_offset(z, head), axis=-1)
        return [head_vjp(p - (mx.arange(head.vocab_size) == labels[:, None]), z, head)]

    return in_chunks(chunk, n[None], [labels], head.vocab_size)[0][0]


def _cosines(updates: Sequence[np.ndarray], gradients: Sequence[np.ndarray]) -> list[list[float]]:
    """Return the mean cosine, the fraction below 0 and the cosine of the whole sequence, each for every block.

    A block that adds nothing at a position, or a gradient of 0, is a cosine of 0.
    """
    means, negative, whole = [], [], []
    for update, gradient in zip(updates, gradients, strict=True):
        products = np.sum(update * gradient, axis=1)
        sizes = np.linalg.norm(update, axis=1) * np.linalg.norm(gradient, axis=1)
        means.append(float(np.mean(products / np.where(sizes > 0, sizes, 1))))
        negative.append(float(np.mean(products < 0)))
        size = float(np.linalg.norm(update) * np.linalg.norm(gradient))
        whole.append(float(products.sum()) / size if size > 0 else 0.0)
    return [means, negative, whole]
