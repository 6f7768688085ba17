"""From hidden states to rows that are ready for the head, and the choice of layers and positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.lenses.lens import Lens, TunedLens
from metalens.lenses.translators import parameters_of, translated
from metalens.models.unembed import NormFunction
from metalens.ops import LensStats, Norm
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidTypeError, InvalidValueError


def lens_rows(hidden: Sequence[mx.array], layers: Sequence[int], lens: Lens, norm: NormFunction) -> mx.array:
    """Apply a lens and a norm to the output of some blocks. Lazy.

    Args:
        hidden: output of block i at index i, [T, D] each.
        layers: indices of the blocks to read.
        lens: the lens.
        norm: the final norm, or its replacement.

    Returns:
        [len(layers), T, D], ready for the head.

    Raises:
        InvalidValueError: if the lens returns another shape.
    """
    if type(lens) is TunedLens and isinstance(norm, Norm):  # a subclass may have a __call__ of its own
        translators = [lens.translator(layer, hidden[layer].shape[-1]) for layer in layers]
        return mx.stack([translated(parameters_of(t), hidden[layer], norm) for layer, t in zip(layers, translators, strict=True)])
    rows = [norm(lens(hidden[layer], layer)) for layer in layers]
    for layer, translated_rows in zip(layers, rows, strict=True):
        if translated_rows.shape != hidden[layer].shape:
            raise InvalidValueError(
                f"The lens turned hidden states {hidden[layer].shape} of layer {layer} into {translated_rows.shape}. Both must be equal."
            )
    return mx.stack(rows)


def require_finite(stats: LensStats) -> None:
    """Check that every row of logits has a softmax. A damaged weight of the model or the lens, which this input reached, leaves it without one.

    Raises:
        InvalidValueError: if the logits of a row are NaN or infinite, or -inf for every token.
    """
    if not to_float(mx.all(mx.isfinite(stats.lse))):
        raise InvalidValueError(
            "The logits of some layer are NaN or infinite for this input: "
            "the model or the lens holds damaged weights, or the model is float16 and overflows. "
            "Convert the model to bfloat16 (mlx_lm.convert --dtype bfloat16); else load or train it again."
        )


def select_layers(layers: Sequence[int] | mx.array | None, num_layers: int) -> list[int]:
    """Return the layers that a caller asks for: all for None, else the given ones in their order, each once.

    Args:
        layers: layer numbers, negative from the end; None = all.
        num_layers: L, blocks of the model.

    Returns:
        numbers from 0 to L - 1.

    Raises:
        InvalidValueError: if the model does not have one of the layers; the message names it.
        InvalidTypeError: if these are no layer numbers.
    """
    if layers is None:
        return list(range(num_layers))
    if isinstance(layers, mx.array):  # its items are arrays, which would become keys of results
        layers = layers.tolist()  # type: ignore[assignment]
    if isinstance(layers, str) or not isinstance(layers, Iterable) or not all(is_whole(layer) for layer in layers):
        raise InvalidTypeError(f"layers must be None or a list of layer numbers like [0, -1], got {layers!r:.100}.")
    unknown = [layer for layer in layers if not -num_layers <= layer < num_layers]
    if unknown:
        raise InvalidValueError(
            f"The model has layers 0 to {num_layers - 1}; there is no layer {', '.join(map(str, unknown))}. "
            f"Negative numbers from {-num_layers} count from the end."
        )
    return list(dict.fromkeys(int(layer) % num_layers for layer in layers))


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number. True and False are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def select_position(position: int | None, length: int) -> slice:
    """Return the slice of the token axis that a position names: all tokens for None, else one token, negative from the end.

    Raises:
        InvalidValueError: if the text does not have this position.
        InvalidTypeError: if it is no whole number.
    """
    if position is None:
        return slice(None)
    if not is_whole(position):
        raise InvalidTypeError(f"position must be None or a whole number, got {position!r:.100}.")
    if not -length <= position < length:
        raise InvalidValueError(f"Position {position} is out of bounds for sequence length {length}. Valid range: [{-length}, {length - 1}]")
    position %= length
    return slice(position, position + 1)
