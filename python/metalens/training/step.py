"""The gradient of one step, layer by layer: the head takes all layers in one batch, and memory does not grow with the number of layers.

The loss of a layer depends on its own translator alone, so no graph spans all layers. The rows of all layers go through the head together
(ops.lens_kl), which returns dKL/dn. From there the gradient of each layer goes back through its norm and its translator (ops.translate_norm).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from metalens.lenses.lens import TunedLens
from metalens.lenses.translators import parameters_of, translated
from metalens.models.capture import HiddenStates
from metalens.models.layers import Layer
from metalens.models.unembed import Unembed
from metalens.ops import Head, Norm, lens_ce, lens_kl, lens_target, normed, use_precision
from metalens.ops.backends import Precision, given_precision, precision
from metalens.training.objective import KL, Objective
from metalens.training.optimizer import Parameters
from metalens.training.vocabulary import PIECE
from metalens.utils.renamed import renamed_arguments

PIECE_WORK = 40 * 10**9  # multiplications and additions in one evaluation on a CPU, about a second of one core
# Operands of all products of a step with a sampled vocabulary, unless a precision was set. Rounding those of loss and gradient to 16 bits moves a
# gradient by 0.4 %, the sample by 4 % and more, and the choice of the text by 20 %. Rounding those of the model's forward pass raises the final KL by
# 0.01 % (demo, 200 steps of 128 tokens, two seeds: 0.92810 and 0.94025 nats in float32, 0.92815 and 0.94035 with this).
OF_SAMPLES: Precision = "bfloat16"
LEAST_PIECE = 16  # tokens: fewer rows use the kernels badly

# {"translators": [{"weight": [D, D], "bias": [D]}, ...]}: a tree like TunedLens.parameters().
Gradient = dict[str, list[Parameters]]


@dataclass
class Sums:
    """Sums over the tokens of a step, layer by layer. Float32, evaluated.

    Attributes:
        layers: layers that are trained.
        losses: sum of the loss over tokens, nats, [len(layers)].
        gradients: gradient of that sum for the parameters of each layer, in the order of `layers`; empty before the first batch.
        tokens: number of tokens.
    """

    layers: list[Layer]
    losses: mx.array
    gradients: list[Parameters] = field(default_factory=list)
    tokens: int = 0


def step_operands(sampled: bool) -> Precision:
    """Return the precision of the operands of a step's products: the setting. With a sampled vocabulary OF_SAMPLES, if none was set."""
    return OF_SAMPLES if sampled and given_precision() is None else precision()


def no_sums(layers: Sequence[Layer]) -> Sums:
    """Return the sums before the first batch."""
    return Sums(list(layers), mx.zeros((len(layers),)))


def piece_tokens(layers: int, head: Head) -> int | None:
    """Return the tokens whose rows go through the head in one evaluation, None for all of a batch.

    On a CPU, a batch of all layers may take half a minute. Pieces of about a second let a progress bar move and a run stop. They depend on shapes
    alone, and a row's result does not depend on the others, so a run stays reproducible.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return None
    return max(LEAST_PIECE, PIECE_WORK // (4 * max(layers, 1) * head.vocab_size * head.weight.shape[1]))


def accumulate(
    sums: Sums,
    parameters: Sequence[Parameters],
    batch: HiddenStates,
    unembed: Unembed,
    done: Callable[[int], None] = lambda _: None,
    heads: Callable[[mx.array, int], Iterable[Head]] | None = None,
    objective: Objective = KL,
) -> None:
    """Add the losses and gradients of a batch to the sums. The gradients of one layer at a time are in memory twice.

    Args:
        sums: sums of the step so far.
        parameters: parameters of each layer, in the order of `sums.layers`.
        batch: one forward pass, hidden [B, T, D] per layer. Padding takes no part.
        unembed: the model's norm and head.
        done: function of a number of tokens that is called when they have gone through the head. If it raises, the sums are as they were.
        heads: function of the model's normed rows [T, D], and of the number of tokens in the sums, that yields the head for every PIECE tokens
            (see `VocabularySampler.heads`). None = the unembedding's own, with the full vocabulary.
        objective: the loss.
    """
    norm = unembed.norm
    at, to = objective.pairs(batch)
    if at is not None and not at.size:  # no token has a partner
        return
    hidden = [mx.stop_gradient(batch.rows(layer, at)).astype(mx.float32) for layer in sums.layers]
    last = mx.stop_gradient(batch.rows(-1, to)).astype(mx.float32)
    rows = [translated(p, h, norm) for p, h in zip(parameters, hidden, strict=True)]
    n_model, labels = normed(last, norm), objective.labels(batch, to)
    pieces = ([unembed.head], last.shape[0]) if heads is None else (heads(n_model, sums.tokens), PIECE)
    operands = step_operands(heads is not None)
    exact = _exact_layers(sums.layers, rows, n_model, len(batch.hidden)) if labels is None else set()
    inexact = [i for i in range(len(rows)) if i not in exact]
    n = mx.stack([rows[i] for i in inexact]) if inexact else mx.zeros((0, *n_model.shape))
    with use_precision(operands):
        found, dn = _loss_in_pieces(n, n_model, labels, *pieces, done)
    place = {i: row for row, i in enumerate(inexact)}
    for i, (of_layer, h) in enumerate(zip(parameters, hidden, strict=True)):
        if i in exact:
            gradient = {name: mx.zeros(p.shape) for name, p in of_layer.items()}
        else:
            with use_precision(operands):
                gradient = _backward(of_layer, h, norm, dn[place[i]])
        if len(sums.gradients) > i:
            gradient = {name: sums.gradients[i][name] + g for name, g in gradient.items()}
            sums.gradients[i] = gradient
        else:
            sums.gradients.append(gradient)
        mx.eval(gradient)
    losses = mx.sum(found, axis=1)
    sums.losses = sums.losses + mx.stack([mx.zeros(()) if i in exact else losses[place[i]] for i in range(len(rows))])
    mx.eval(sums.losses)
    sums.tokens += last.shape[0]


def _exact_layers(layers: Sequence[Layer], rows: Sequence[mx.array], n_model: mx.array, blocks: int) -> set[int]:
    """Return the places of layers whose rows are the model's own, bit for bit: KL and gradient are 0, and no product is needed.

    That is the last block while its translator is the identity, which it starts with and which a loss of 0 does not change.

    Args:
        layers: the layers.
        rows: normed rows [T, D] of each layer.
        n_model: the model's rows [T, D].
        blocks: number of blocks of the model.
    """
    return {i for i, layer in enumerate(layers) if layer == blocks - 1 and bool(mx.array_equal(rows[i], n_model))}


def _loss_in_pieces(
    n: mx.array, n_model: mx.array, labels: mx.array | None, heads: Iterable[Head], length: int, done: Callable[[int], None]
) -> tuple[mx.array, mx.array]:
    """Return the loss of rows [L, T, D] and its gradient, evaluated piece by piece.

    Args:
        n: rows of the lens.
        n_model: the model's rows [T, D].
        labels: [T] token ids for `lens_ce`. None = `lens_kl` beside the model's rows.
        heads: a head for every `length` tokens.
        length: number of tokens of a head.
        done: as in `accumulate`.
    """
    tokens = n_model.shape[0]
    found = []
    for i, head in enumerate(heads):
        end = min((i + 1) * length, tokens)
        size = piece_tokens(n.shape[0], head) or length
        for start in range(i * length, end, size):
            part = slice(start, min(start + size, end))
            rows = n[:, part]
            found.append(lens_kl(rows, lens_target(n_model[part], head), head) if labels is None else lens_ce(rows, labels[part], head))
            mx.eval(found[-1])
            done(part.stop - start)
    if len(found) == 1:
        return found[0]
    loss, dn = (mx.concatenate(list(each), axis=1) for each in zip(*found, strict=True))
    return loss, dn


def _backward(parameters: Parameters, h: mx.array, norm: Norm, dn: mx.array) -> Parameters:
    """Return the gradient of a translator's parameters from that of its normed output, dn [T, D]. Lazy."""
    names = list(parameters)

    def forward(*values: mx.array) -> mx.array:
        return translated(dict(zip(names, values, strict=True)), h, norm)

    # The gradient of a bfloat16 array would be rounded to bfloat16.
    _, gradient = mx.vjp(forward, [p.astype(mx.float32) for p in parameters.values()], [dn])
    return dict(zip(names, gradient, strict=True))


@renamed_arguments(stream="batch")
def loss_and_gradient(lens: TunedLens, batch: HiddenStates, unembed: Unembed) -> tuple[mx.array, Gradient]:
    """Return the mean KL(model || lens) of every layer, and the gradient of the mean over layers (mlxterp's loss).

    Args:
        lens: a lens with as many layers as the model, and as wide.
        batch: one forward pass, hidden [B, T, D] per layer.
        unembed: the model's norm and head.

    Returns:
        losses [L] in nats per token, and the gradient as a tree like `lens.parameters()`. Evaluated.
    """
    sums = no_sums(range(lens.num_layers))
    accumulate(sums, [parameters_of(lens.translator_of(layer)) for layer in sums.layers], batch, unembed)
    scale = 1 / (sums.tokens * lens.num_layers)
    gradients = [{name: g * scale for name, g in gradient.items()} for gradient in sums.gradients]
    losses = sums.losses / sums.tokens
    mx.eval(losses, gradients)
    return losses, {"translators": gradients}
