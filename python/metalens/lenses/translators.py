"""Translators: the affine maps that a tuned lens applies to one block's output, and their variants.

    full        y = W h + b                    {"weight": W [D, D], "bias": b [D]}
    low-rank    y = h + B (A h) + b            {"down": A [r, D], "up": B [D, r], "bias": b [D]}      that is, W = I + B A
    bias        y = h + b                      {"bias": b [D]}
    none        y = h                          {}

Every variant is an `nn.Module` that is the identity before training and has `weight` [D, D] and `bias` [D] to read,
whatever it stores. The names of the parameters tell the variant. So `translate` is a pure function of the parameters,
which `mx.vjp` can differentiate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalens.ops import Norm, Weight, linear, translate_norm

# {variant: names of the parameters that one of its translators stores}
VARIANTS = {"full": ("weight", "bias"), "low-rank": ("down", "up", "bias"), "bias": ("bias",)}


def parameters_of(translator: nn.Module) -> dict[str, mx.array]:
    """Return the arrays that one translator stores, frozen or not: {name in VARIANTS: array}, {} for `NoTranslator`."""
    parameters: dict[str, mx.array] = translator.parameters()
    return parameters


def translate(parameters: Mapping[str, mx.array], h: mx.array) -> mx.array:
    """Apply a translator to every row. Lazy; differentiable in the parameters and in h.

    Args:
        parameters: parameters of one translator, as `parameters_of` returns them. Their names tell the variant. Without
            "bias", b = 0.
        h: [..., D], any float type; computed in float32.

    Returns:
        [..., D] float32.
    """
    h = h.astype(mx.float32)
    if "weight" in parameters:
        h = linear(h, Weight(parameters["weight"]))
    elif "down" in parameters:
        h = h + linear(linear(h, Weight(parameters["down"])), Weight(parameters["up"]))
    return h + parameters["bias"] if "bias" in parameters else h


def translated(parameters: Mapping[str, mx.array], h: mx.array, norm: Norm) -> mx.array:
    """Apply a translator and the model's final norm to every row: norm(translator(h)). Lazy; differentiable in the parameters and in h.

    Args:
        parameters: parameters of one translator of any variant, as `parameters_of` returns them.
        h: [..., D], any float type.
        norm: the final norm of the model.

    Returns:
        [..., D] float32, ready for the head.
    """
    if "weight" in parameters:
        return translate_norm(h, parameters["weight"], parameters["bias"], norm)
    bias = parameters.get("bias", mx.zeros(h.shape[-1:]))
    unbiased = translate({name: p for name, p in parameters.items() if name != "bias"}, h)
    return translate_norm(unbiased, None, bias, norm)


def dense(parameters: Mapping[str, mx.array], hidden_dim: int) -> tuple[mx.array, mx.array]:
    """Return (W [D, D], b [D]) of y = W h + b for a translator with these parameters. Lazy. A full translator's own arrays are not copied."""
    bias = parameters["bias"] if "bias" in parameters else mx.zeros((hidden_dim,))
    if "weight" in parameters:
        return parameters["weight"], bias
    weight = mx.eye(hidden_dim)
    return (weight + parameters["up"] @ parameters["down"] if "down" in parameters else weight), bias


def shape_of(parameter: str, hidden_dim: int, rank: int | None) -> tuple[int, ...]:
    """Return the shape of a translator's parameter, by its name in VARIANTS."""
    shapes = {"weight": (hidden_dim, hidden_dim), "down": (rank or 0, hidden_dim), "up": (hidden_dim, rank or 0), "bias": (hidden_dim,)}
    return shapes[parameter]


class Translator(nn.Module):
    """Base of all translators but the full one. It computes `weight` from the parameters.

    Attributes:
        hidden_dim: D, width of the residual stream.
    """

    def __init__(self, hidden_dim: int) -> None:
        """Make a translator for vectors of width D."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.hidden_dim = hidden_dim

    def __call__(self, h: mx.array) -> mx.array:
        """Translate h [..., D] of any float type to [..., D] float32."""
        return translate(parameters_of(self), h)

    def __setattr__(self, key: str, value: Any) -> None:
        if isinstance(getattr(type(self), key, None), property):
            raise AttributeError(f"{key} of a {type(self).__name__} can only be read. TunedLens.to_full() returns a lens whose translators store it.")
        super().__setattr__(key, value)

    @property
    def weight(self) -> mx.array:
        """Return W [D, D] of y = W h + b. Each call computes it."""
        return dense(parameters_of(self), self.hidden_dim)[0]


class NoTranslator(Translator):
    """y = h, for a layer that the lens does not change."""

    @property
    def bias(self) -> mx.array:
        """Return zeros [D]."""
        return mx.zeros((self.hidden_dim,))


class LowRankTranslator(Translator):
    """y = h + B (A h) + b, with A [r, D] in `down` and B [D, r] in `up`."""

    def __init__(self, hidden_dim: int, rank: int, key: mx.array) -> None:
        """Make an identity: B starts at zero.

        Args:
            hidden_dim: D, width of the residual stream.
            rank: r, rows of A.
            key: random key for A. Its entries have the standard deviation D^-1/2, so that A h is about as large as h.
        """
        super().__init__(hidden_dim)
        self.down = mx.random.normal((rank, hidden_dim), scale=hidden_dim**-0.5, key=key)
        self.up = mx.zeros((hidden_dim, rank))
        self.bias = mx.zeros((hidden_dim,))


class BiasTranslator(Translator):
    """y = h + b."""

    def __init__(self, hidden_dim: int) -> None:
        """Make an identity: b starts at zero."""
        super().__init__(hidden_dim)
        self.bias = mx.zeros((hidden_dim,))


def identity_linear(hidden_dim: int) -> nn.Linear:
    """Return a full translator that is the identity: W = I, b = 0, float32."""
    # nn.Linear.__init__ would draw weights from MLX's global random state, which is the user's.
    translator = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(translator)
    translator.weight = mx.eye(hidden_dim)
    translator.bias = mx.zeros((hidden_dim,))
    return translator
