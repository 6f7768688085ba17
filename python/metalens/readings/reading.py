"""What a lens says: predictions and statistics of the residual stream, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from metalens.lenses.lens import Lens, TunedLens
from metalens.lenses.translators import parameters_of, translated
from metalens.models.unembed import NormFunction
from metalens.ops import LensStats, Norm
from metalens.utils.arrays import to_float, to_list
from metalens.utils.errors import InvalidValueError

# {layer: [[(token id, score, token), ...] per position]}; score is the raw logit, best first.
Predictions = dict[int, list[list[tuple[int, float, str]]]]


@dataclass(frozen=True)
class Reading:
    """One text read through one lens.

    Attributes:
        layers: the blocks read, in the order asked for.
        tokens: the text of each position read.
        predictions: top-k of every layer and position.
        stats: [len(layers), T] arrays.
        model: what the model itself predicts, [1, T] arrays.
        model_tokens: its most likely next token at each position.
    """

    layers: list[int]
    tokens: list[str]
    predictions: Predictions
    stats: LensStats
    model: LensStats
    model_tokens: list[str]


def lens_rows(hidden: Sequence[mx.array], layers: Sequence[int], lens: Lens, norm: NormFunction) -> mx.array:
    """Translate and norm: [len(layers), T, D] from hidden[layer] [T, D], ready for the head."""
    if type(lens) is TunedLens and isinstance(norm, Norm):  # a subclass may translate otherwise
        translators = [lens.translator(layer, hidden[layer].shape[-1]) for layer in layers]
        return mx.stack([translated(parameters_of(t), hidden[layer], norm) for layer, t in zip(layers, translators, strict=True)])
    return mx.stack([norm(lens(hidden[layer], layer)) for layer in layers])


def require_finite(stats: LensStats) -> None:
    """Raise ValueError if some row's logits are NaN: a weight that this input reached is damaged, or the lens's function is."""
    if to_float(mx.any(mx.isnan(stats.lse))):
        raise InvalidValueError(
            "The logits of some layer are NaN for this input: the model or the lens holds damaged weights. Load, convert or train it again."
        )


def select_layers(layers: Sequence[int] | None, num_layers: int) -> list[int]:
    """All layers for None, else the given ones in their order.

    Raises:
        ValueError: naming the layers that the model does not have.
    """
    if layers is None:
        return list(range(num_layers))
    unknown = [layer for layer in layers if not 0 <= layer < num_layers]
    if unknown:
        raise InvalidValueError(f"The model has layers 0 to {num_layers - 1}; there is no layer {', '.join(map(str, unknown))}.")
    return list(layers)


def select_position(position: int | None, length: int) -> slice:
    """The slice of the token axis that `position` means: everything for None, else one token, negative from the end."""
    if position is None:
        return slice(None)
    if not -length <= position < length:
        raise InvalidValueError(f"Position {position} is out of bounds for sequence length {length}. Valid range: [{-length}, {length - 1}]")
    position %= length
    return slice(position, position + 1)


def predictions(stats: LensStats, layers: Sequence[int], token_strings: dict[int, str]) -> Predictions:
    """The top-k of every layer and position, with the tokens' text looked up in `token_strings`."""
    ids, logits = to_list(stats.top_ids), to_list(stats.top_logits)
    return {
        layer: [[(i, z, token_strings[i]) for i, z in zip(*position, strict=True)] for position in zip(ids[row], logits[row], strict=True)]
        for row, layer in enumerate(layers)
    }
