"""lens_kl: KL(model || lens) of rows and its gradient, without ever holding all logits.

Rows of all layers share one head call per chunk of tokens, so U is read once for all of them, and the loss of one layer never meets the graph of
another: memory does not grow with the number of layers. The gradient is formed in the forward pass ("gradient in forward", design of every kernel
that follows): dKL/dz = q - p, subtracted before it is multiplied with U, because two means that nearly cancel must not be rounded apart.
"""

from __future__ import annotations

import mlx.core as mx

from metalens.ops.chunks import token_chunks
from metalens.ops.softmax import kl_divergence, softmax
from metalens.ops.unembed import Head, head_logits, head_pullback


def lens_kl(n: mx.array, n_model: mx.array, head: Head) -> tuple[mx.array, mx.array]:
    """KL(p || q) in nats of every row, and its gradient with respect to n.

    p is what the model predicts from its own last state, q what a lens predicts for the same token.

    Args:
        n: [L, N, D] lens rows after the final norm: L layers of N tokens.
        n_model: [N, D] the model's own rows after the final norm; shared by all layers.
        head: the unembedding.

    Returns:
        kl [L, N] float32, and dkl/dn [L, N, D] float32. Evaluated, chunk by chunk.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    _, d = head.weight.shape
    if n.ndim != 3 or n_model.ndim != 2 or n.shape[1:] != n_model.shape or n.shape[-1] != d:
        raise ValueError(f"lens_kl needs n [L, N, {d}] and n_model [N, {d}]; got {n.shape} and {n_model.shape}.")
    kls: list[mx.array] = []
    gradients: list[mx.array] = []
    for chunk in token_chunks(n.shape[1], n.shape[0], head.vocab_size):
        kl, gradient = _chunk(n[:, chunk], n_model[chunk], head)
        # Evaluated here, so that one chunk's logits are gone before the next chunk's are made.
        mx.eval(kl, gradient)
        kls.append(kl)
        gradients.append(gradient)
    if not kls:
        return mx.zeros(n.shape[:2]), mx.zeros(n.shape)
    return mx.concatenate(kls, axis=1), mx.concatenate(gradients, axis=1)


def _chunk(n: mx.array, n_model: mx.array, head: Head) -> tuple[mx.array, mx.array]:
    z = head_logits(n, head)
    log_q, q, _ = softmax(z)
    log_p, p, _ = softmax(head_logits(n_model, head))
    return kl_divergence(p, log_p, log_q), head_pullback(q - p, z, head)
