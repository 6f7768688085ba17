"""The gradient of one step: layer by layer, heads batched, memory flat in the number of layers.

Each layer's loss touches only its own translator, so nothing needs a graph over all layers. The rows of all layers go through the head together
(ops.lens_kl), which returns dKL/dn; from there each layer is pulled back through its norm and its translator alone (ops.translate_norm).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from metalens.lens import TunedLens
from metalens.ops import lens_kl, lens_target, normed, translate_norm
from metalens.readout import lens_rows
from metalens.stream import Stream
from metalens.unembed import Unembed

# {"translators": [{"weight": [D, D], "bias": [D]}, ...]}, the tree of TunedLens.parameters()
Gradient = dict[str, Any]


def loss_and_gradient(lens: TunedLens, stream: Stream, unembed: Unembed) -> tuple[mx.array, Gradient]:
    """Mean KL(model || lens) of every layer, and the gradient of the mean over layers (mlxterp's loss).

    Args:
        lens: of the model's depth and width.
        stream: one forward pass, hidden [B, T, D] per layer.
        unembed: the model's norm and head.

    Returns:
        losses [L] in nats per token, and the gradient as a tree like `lens.parameters()`. Evaluated.
    """
    d, num_layers = lens.hidden_dim, lens.num_layers
    hidden = [mx.stop_gradient(h).reshape(-1, d).astype(mx.float32) for h in stream.hidden]
    tokens = hidden[0].shape[0]
    target = lens_target(normed(hidden[-1], unembed.norm), unembed.head)
    n = lens_rows(hidden, range(num_layers), lens, unembed.norm)
    kl, dn = lens_kl(n, target, unembed.head)

    gradients = []
    for layer in range(num_layers):

        def rows(weight: mx.array, bias: mx.array, h: mx.array = hidden[layer]) -> mx.array:
            return translate_norm(h, weight, bias, unembed.norm)

        translator = lens.translators[layer]
        _, (dw, db) = mx.vjp(rows, [translator.weight, translator.bias], [dn[layer] / (tokens * num_layers)])
        mx.eval(dw, db)
        gradients.append({"weight": dw, "bias": db})
    losses = mx.mean(kl, axis=1)
    mx.eval(losses)
    return losses, {"translators": gradients}
