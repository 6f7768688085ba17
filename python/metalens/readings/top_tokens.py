"""The most likely tokens of a row of logits, in the forms that callers take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from metalens.models.layers import Layer
from metalens.ops import Head, LensStats, Weight, lens_stats
from metalens.ops.stats import check_top_k, largest_logits
from metalens.utils.arrays import to_list
from metalens.utils.errors import InvalidTypeError, InvalidValueError

# {layer: [[(token id, raw logit, token), ...] per position]}, most likely first: mlxterp's form, with 'embedding' where it was asked for.
Predictions: TypeAlias = dict[Layer, list[list[tuple[int, float, str]]]]
# Token ids or (id, logit) pairs of one hidden state; or one such list per hidden state.
TokenPredictions: TypeAlias = list[int] | list[tuple[int, float]] | list[list[int]] | list[list[tuple[int, float]]]


class TopToken(NamedTuple):
    """One of the most likely next tokens.

    Attributes:
        id: token id.
        probability: softmax of the logits over the vocabulary, 0 to 1.
        logit: raw logit.
        token: text of the token.
    """

    id: int
    probability: float
    logit: float
    token: str


def predictions_of(stats: LensStats, layers: Sequence[Layer], token_strings: dict[int, str]) -> Predictions:
    """Return the top-k tokens of every layer and position.

    Args:
        stats: statistics of [len(layers), T] rows of logits.
        layers: the layer of each row.
        token_strings: {token id: text of the token}.
    """
    ids, logits = to_list(stats.top_ids), to_list(stats.top_logits)
    return {
        layer: [[(i, z, token_strings[i]) for i, z in zip(*position, strict=True)] for position in zip(ids[row], logits[row], strict=True)]
        for row, layer in enumerate(layers)
    }


def token_predictions(
    hidden_state: mx.array,
    head: Head,
    top_k: int = 10,
    return_scores: bool = False,
    embedding_layer: nn.Module | None = None,
    lm_head: Callable[[mx.array], mx.array] | None = None,
) -> TokenPredictions:
    """Return the most likely tokens of hidden states that come after the final norm.

    Args:
        hidden_state: [D] or [N, D], after the final norm.
        head: unembedding of the model.
        top_k: number of tokens, 1 to V.
        return_scores: return (id, logit) pairs instead of ids.
        embedding_layer: an `mlx.nn` embedding or linear layer that replaces the head.
        lm_head: a function [N, D] -> logits [N, V] that replaces the head and `embedding_layer`.

    Returns:
        ids or pairs, most likely first; for [N, D] a list with one such list per row.

    Raises:
        InvalidValueError: if `hidden_state` has another number of dimensions, or `top_k` is out of range.
        InvalidTypeError: if `embedding_layer` is not such a layer.
    """
    if hidden_state.ndim not in (1, 2):
        raise InvalidValueError(f"hidden_state must be [D] or [N, D], got {hidden_state.shape}. Index a batch before passing it.")
    rows = hidden_state.reshape(-1, hidden_state.shape[-1])
    if lm_head is not None:
        z = lm_head(rows).astype(mx.float32)
        check_top_k(top_k, z.shape[-1])
        ids, logits = largest_logits(z, top_k)
    else:
        stats = lens_stats(rows[None], head if embedding_layer is None else _head_of(embedding_layer), top_k)
        ids, logits = stats.top_ids[0], stats.top_logits[0]
    found: list[Any] = to_list(ids)
    if return_scores:
        found = [list(zip(i, z, strict=True)) for i, z in zip(found, to_list(logits), strict=True)]
    return found[0] if hidden_state.ndim == 1 else found


def _head_of(embedding: Any) -> Head:
    if not isinstance(embedding, nn.Module) or "weight" not in embedding:
        raise InvalidTypeError(f"embedding_layer must be an mlx.nn embedding or linear layer, not {type(embedding).__name__}.")
    return Head(Weight.from_layer(embedding))
