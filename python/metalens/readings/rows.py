"""From hidden states to rows that are ready for the head, and the choice of layers and positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.lenses.lens import Lens, TunedLens
from metalens.lenses.translators import parameters_of, translated
from metalens.models.layers import EMBEDDING, Layer
from metalens.models.unembed import NormFunction
from metalens.ops import LensStats, Norm
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidTypeError, InvalidValueError


def apply_lens(lens: Lens, h: mx.array, layer: Layer) -> mx.array:
    """Return what a lens makes of hidden states [..., D] of a layer. Of the embedding's output: h, unless the lens has a translator for it. Lazy."""
    if layer != EMBEDDING:
        return lens(h, layer)
    return lens(h, EMBEDDING) if isinstance(lens, TunedLens) and lens.embedding_translator is not None else h


def lens_rows(hidden: Mapping[Layer, mx.array] | Sequence[mx.array], layers: Sequence[Layer], lens: Lens, norm: NormFunction) -> mx.array:
    """Apply a lens and a norm to the hidden states of some layers. Lazy.

    Args:
        hidden: hidden states [T, D] by layer: the output of block i at index i.
        layers: the layers to read, R in number.
        lens: the lens.
        norm: the final norm, or its replacement.

    Returns:
        [R, T, D], ready for the head.

    Raises:
        InvalidValueError: if the lens returns another shape.
    """
    states = [hidden[layer] if isinstance(hidden, Mapping) else hidden[int(layer)] for layer in layers]
    if type(lens) is TunedLens and isinstance(norm, Norm):  # a subclass may have a __call__ of its own
        translators = [lens.translator(layer, h.shape[-1]) for layer, h in zip(layers, states, strict=True)]
        return mx.stack([translated(parameters_of(t), h, norm) for t, h in zip(translators, states, strict=True)])
    rows = [norm(apply_lens(lens, h, layer)) for layer, h in zip(layers, states, strict=True)]
    for layer, h, translated_rows in zip(layers, states, rows, strict=True):
        if translated_rows.shape != h.shape:
            raise InvalidValueError(f"The lens turned hidden states {h.shape} of layer {layer} into {translated_rows.shape}. Both must be equal.")
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
