"""The gradient of one step: layer by layer, heads batched, memory flat in the number of layers.

Each layer's loss touches only its own translator, so nothing needs a graph over all layers. The rows of all layers go through the head together
(ops.lens_kl), which returns dKL/dn; from there each layer is pulled back through its norm and its translator alone (ops.translate_norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from metalens.lenses.lens import TunedLens
from metalens.lenses.translators import parameters_of, translated
from metalens.models.capture import HiddenStates
from metalens.models.unembed import Unembed
from metalens.ops import Norm, lens_kl, lens_target, normed
from metalens.training.optimizer import Parameters

# {"translators": [{"weight": [D, D], "bias": [D]}, ...]}, the tree of TunedLens.parameters()
Gradient = dict[str, Any]


@dataclass
class Sums:
    """What a step adds up over its tokens, layer by layer. Float32, evaluated.

    Attributes:
        layers: the layers that are trained.
        losses: [len(layers)] sum of KL(model || lens) over tokens, nats.
        gradients: its gradient for every layer's parameters, in the order of `layers`; empty before the first batch.
        tokens: so many.
    """

    layers: list[int]
    losses: mx.array
    gradients: list[Parameters] = field(default_factory=list)
    tokens: int = 0


def no_sums(layers: Sequence[int]) -> Sums:
    """Before the first batch."""
    return Sums(list(layers), mx.zeros((len(layers),)))


def accumulate(sums: Sums, parameters: Sequence[Parameters], stream: HiddenStates, unembed: Unembed) -> None:
    """Add a batch's losses and gradients to the sums. The gradients of one layer at a time are in memory twice.

    Args:
        sums: of the step so far.
        parameters: of the layers that the sums are of.
        stream: one forward pass, hidden [B, T, D] per layer. Padding takes no part.
        unembed: the model's norm and head.
    """
    norm = unembed.norm
    assert isinstance(norm, Norm)
    hidden = [mx.stop_gradient(stream.rows(layer)).astype(mx.float32) for layer in sums.layers]
    last = mx.stop_gradient(stream.rows(-1)).astype(mx.float32)
    target = lens_target(normed(last, norm), unembed.head)
    n = mx.stack([translated(p, h, norm) for p, h in zip(parameters, hidden, strict=True)])
    kl, dn = lens_kl(n, target, unembed.head)
    mx.eval(kl, dn)
    for i, (of_layer, h) in enumerate(zip(parameters, hidden, strict=True)):
        names, values = list(of_layer), [p.astype(mx.float32) for p in of_layer.values()]  # a bfloat16's gradient would be rounded to bfloat16

        def rows(*values: mx.array, names: list[str] = names, h: mx.array = h) -> mx.array:
            return translated(dict(zip(names, values, strict=True)), h, norm)

        _, found = mx.vjp(rows, values, [dn[i]])
        gradient = dict(zip(names, found, strict=True))
        if len(sums.gradients) > i:
            gradient = {name: sums.gradients[i][name] + g for name, g in gradient.items()}
            sums.gradients[i] = gradient
        else:
            sums.gradients.append(gradient)
        mx.eval(gradient)
    sums.losses = sums.losses + mx.sum(kl, axis=1)
    mx.eval(sums.losses)
    sums.tokens += last.shape[0]


def loss_and_gradient(lens: TunedLens, stream: HiddenStates, unembed: Unembed) -> tuple[mx.array, Gradient]:
    """Mean KL(model || lens) of every layer, and the gradient of the mean over layers (mlxterp's loss).

    Args:
        lens: of the model's depth and width.
        stream: one forward pass, hidden [B, T, D] per layer.
        unembed: the model's norm and head.

    Returns:
        losses [L] in nats per token, and the gradient as a tree like `lens.parameters()`. Evaluated.
    """
    sums = no_sums(range(lens.num_layers))
    accumulate(sums, [parameters_of(lens.translators[layer]) for layer in sums.layers], stream, unembed)
    scale = 1 / (sums.tokens * lens.num_layers)
    gradients = [{name: g * scale for name, g in gradient.items()} for gradient in sums.gradients]
    losses = sums.losses / sums.tokens
    mx.eval(losses, gradients)
    return losses, {"translators": gradients}
