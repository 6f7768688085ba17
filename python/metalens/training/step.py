"""The gradient of one step, layer by layer: the head takes all layers in one batch, and memory does not grow with the number of layers.

The loss of a layer depends on its own translator alone, so no graph spans all layers. The rows of all layers go through the head together
(ops.lens_kl), which returns dKL/dn. From there the gradient of each layer goes back through its norm and its translator (ops.translate_norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from metalens.lenses.lens import TunedLens
from metalens.lenses.translators import parameters_of, translated
from metalens.models.capture import HiddenStates
from metalens.models.unembed import Unembed
from metalens.ops import Norm, lens_kl, lens_target, normed
from metalens.training.optimizer import Parameters
from metalens.utils.renamed import renamed_arguments

# {"translators": [{"weight": [D, D], "bias": [D]}, ...]}: a tree like TunedLens.parameters().
Gradient = dict[str, list[Parameters]]


@dataclass
class Sums:
    """Sums over the tokens of a step, layer by layer. Float32, evaluated.

    Attributes:
        layers: layers that are trained.
        losses: sum of KL(model || lens) over tokens, nats, [len(layers)].
        gradients: gradient of that sum for the parameters of each layer, in the order of `layers`; empty before the first batch.
        tokens: number of tokens.
    """

    layers: list[int]
    losses: mx.array
    gradients: list[Parameters] = field(default_factory=list)
    tokens: int = 0


def no_sums(layers: Sequence[int]) -> Sums:
    """Return the sums before the first batch."""
    return Sums(list(layers), mx.zeros((len(layers),)))


def accumulate(sums: Sums, parameters: Sequence[Parameters], batch: HiddenStates, unembed: Unembed) -> None:
    """Add the losses and gradients of a batch to the sums. The gradients of one layer at a time are in memory twice.

    Args:
        sums: sums of the step so far.
        parameters: parameters of each layer, in the order of `sums.layers`.
        batch: one forward pass, hidden [B, T, D] per layer. Padding takes no part.
        unembed: the model's norm and head.
    """
    norm = unembed.norm
    hidden = [mx.stop_gradient(batch.rows(layer)).astype(mx.float32) for layer in sums.layers]
    last = mx.stop_gradient(batch.rows(-1)).astype(mx.float32)
    target = lens_target(normed(last, norm), unembed.head)
    n = mx.stack([translated(p, h, norm) for p, h in zip(parameters, hidden, strict=True)])
    kl, dn = lens_kl(n, target, unembed.head)
    mx.eval(kl, dn)
    for i, (of_layer, h) in enumerate(zip(parameters, hidden, strict=True)):
        gradient = _backward(of_layer, h, norm, dn[i])
        if len(sums.gradients) > i:
            gradient = {name: sums.gradients[i][name] + g for name, g in gradient.items()}
            sums.gradients[i] = gradient
        else:
            sums.gradients.append(gradient)
        mx.eval(gradient)
    sums.losses = sums.losses + mx.sum(kl, axis=1)
    mx.eval(sums.losses)
    sums.tokens += last.shape[0]


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
    accumulate(sums, [parameters_of(lens.translators[layer]) for layer in sums.layers], batch, unembed)
    scale = 1 / (sums.tokens * lens.num_layers)
    gradients = [{name: g * scale for name, g in gradient.items()} for gradient in sums.gradients]
    losses = sums.losses / sums.tokens
    mx.eval(losses, gradients)
    return losses, {"translators": gradients}
