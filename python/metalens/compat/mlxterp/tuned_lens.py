"""The names of mlxterp.tuned_lens."""

from __future__ import annotations

import mlx.core as mx

from metalens.lenses.lens import TunedLens
from metalens.model import train_tuned_lens
from metalens.ops.softmax import kl_divergence as kl_of_rows

__all__ = ["TunedLens", "kl_divergence", "log_softmax", "train_tuned_lens"]


def log_softmax(x: mx.array, axis: int = -1) -> mx.array:
    """Return the log-probabilities of logits along an axis."""
    return x - mx.logsumexp(x, axis=axis, keepdims=True)


def kl_divergence(log_p: mx.array, log_q: mx.array) -> mx.array:
    """Return the mean over all rows of KL(p || q) in nats, a scalar, from log-probabilities [..., V]."""
    return mx.mean(kl_of_rows(mx.exp(log_p), log_p, log_q))
