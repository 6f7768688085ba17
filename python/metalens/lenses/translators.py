"""Translators: the affine map that a tuned lens applies to one block's output, in its variants.

    full        y = W h + b                    {"weight": W [D, D], "bias": b [D]}
    low-rank    y = h + B (A h) + b            {"down": A [r, D], "up": B [D, r], "bias": b [D]}      that is, W = I + B A
    bias        y = h + b                      {"bias": b [D]}
    none        y = h                          {}

Every variant is an `nn.Module` with `weight` [D, D] and `bias` [D] to read, whatever it stores, and is the identity at the start. The names of the
parameters say which variant they belong to, so that `translate` is a pure function of them: what `mx.vjp` differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metalens.ops import Norm, Weight, linear, translate_norm
from metalens.utils.errors import InvalidValueError

# {variant: the parameters that one translator of it stores}
VARIANTS = {"full": ("weight", "bias"), "low-rank": ("down", "up", "bias"), "bias": ("bias",)}


def parameters_of(translator: nn.Module) -> dict[str, mx.array]:
    """What one translator stores, frozen or not: {name: array}, by the names in VARIANTS; {} for none."""
    parameters: dict[str, mx.array] = translator.parameters()
    return parameters


def translate(parameters: Mapping[str, mx.array], h: mx.array) -> mx.array:
    """The translator with these parameters, applied to every row: lazy, and differentiable in the parameters and h.

    Args:
        parameters: of one translator, `parameters_of(translator)`; their names say which variant it is. Without "bias", b = 0.
        h: [..., D], any float type; widened to float32.

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
    """norm(translator(h)) [..., D] for a translator of any variant, given by its parameters. Lazy; differentiable in them."""
    if "weight" in parameters:
        return translate_norm(h, parameters["weight"], parameters["bias"], norm)
    bias = parameters.get("bias", mx.zeros(h.shape[-1:]))
    unbiased = translate({name: p for name, p in parameters.items() if name != "bias"}, h)
    return translate_norm(unbiased, None, bias, norm)


def dense(parameters: Mapping[str, mx.array], hidden_dim: int) -> tuple[mx.array, mx.array]:
    """(W [D, D], b [D]) of the translator with these parameters: y = W h + b. Lazy; a full translator's own arrays."""
    bias = parameters["bias"] if "bias" in parameters else mx.zeros((hidden_dim,))
    if "weight" in parameters:
        return parameters["weight"], bias
    weight = mx.eye(hidden_dim)
    return (weight + parameters["up"] @ parameters["down"] if "down" in parameters else weight), bias


def shape_of(parameter: str, hidden_dim: int, rank: int | None) -> tuple[int, ...]:
    """The shape of a translator's parameter, by its name in VARIANTS."""
    shapes = {"weight": (hidden_dim, hidden_dim), "down": (rank or 0, hidden_dim), "up": (hidden_dim, rank or 0), "bias": (hidden_dim,)}
    return shapes[parameter]


class Translator(nn.Module):
    """What all but the full translators share: `weight` follows from the parameters.

    Args:
        hidden_dim: D.
    """

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.hidden_dim = hidden_dim

    def __call__(self, h: mx.array) -> mx.array:
        """[..., D] -> [..., D] float32."""
        return translate(parameters_of(self), h)

    def __setattr__(self, key: str, value: Any) -> None:
        if isinstance(getattr(type(self), key, None), property):
            raise AttributeError(f"This translator has no {key} of its own that could be set. TunedLens.to_full() gives a lens whose translators do.")
        super().__setattr__(key, value)

    @property
    def weight(self) -> mx.array:
        """W [D, D] of y = W h + b, made when asked for."""
        return dense(parameters_of(self), self.hidden_dim)[0]


class NoTranslator(Translator):
    """y = h: of a layer that the lens leaves alone."""

    @property
    def bias(self) -> mx.array:
        """Zeros [D]."""
        return mx.zeros((self.hidden_dim,))


class LowRankTranslator(Translator):
    """y = h + B (A h) + b.

    Args:
        hidden_dim: D.
        rank: r, rows of A.
        key: of the random A, whose entries have the standard deviation D^-1/2: A h is then about as large as h. B starts at zero.
    """

    def __init__(self, hidden_dim: int, rank: int, key: mx.array) -> None:
        super().__init__(hidden_dim)
        self.down = mx.random.normal((rank, hidden_dim), scale=hidden_dim**-0.5, key=key)
        self.up = mx.zeros((hidden_dim, rank))
        self.bias = mx.zeros((hidden_dim,))


class BiasTranslator(Translator):
    """y = h + b."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__(hidden_dim)
        self.bias = mx.zeros((hidden_dim,))


def identity_linear(hidden_dim: int) -> nn.Linear:
    """A full translator at its start: W = I, b = 0, float32."""
    translator = nn.Linear(hidden_dim, hidden_dim)
    translator.weight = mx.eye(hidden_dim)
    translator.bias = mx.zeros((hidden_dim,))
    return translator


def read_arrays(file: Path, expected: Callable[[set[str]], Mapping[str, tuple[int, ...]]], what: str) -> dict[str, mx.array]:
    """The arrays of an .npz file, as float32.

    Args:
        file: the archive. Pickled objects in it are not read.
        expected: called with the names that are stored; {name: shape} of those that must be, no more and no fewer.
        what: it should be, for error messages: 'a lens of 2 layers, as x.json says'.

    Raises:
        ValueError: if the file is damaged, or holds other arrays, or NaN or infinity.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            stored = set(archive.files)
            shapes = expected(stored)
            for names, verb in ((set(shapes) - stored, "it holds no"), (stored - set(shapes), "it also holds")):
                if names:
                    raise WrongArraysError(f"{file} is not {what}: {verb} {', '.join(sorted(names)[:4])}.")
            return {name: mx.array(_checked(archive[name], shape, f"{file}: {name}", what)) for name, shape in shapes.items()}
    except WrongArraysError:
        raise
    except Exception as error:  # a dozen types, by which byte was damaged
        raise InvalidValueError(f"{file} is damaged or no .npz archive ({error}). Copy it again, or train the lens again.") from error


class WrongArraysError(InvalidValueError):
    """The archive is whole, but not what its description says."""


def _checked(array: np.ndarray, shape: tuple[int, ...], name: str, what: str) -> np.ndarray:
    if array.shape != shape or array.dtype.kind not in "fiu":
        raise WrongArraysError(f"{name} has shape {array.shape} and type {array.dtype}; {what}, would have numbers of shape {shape}.")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise WrongArraysError(f"{name} holds NaN or infinity. The lens was spoiled in training; train it again.")
    return array
