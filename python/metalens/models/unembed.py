"""Unembed: from a residual stream to logits, as the model itself does it: final norm, head, logit transform.

Found by watching the model, not by names (`metalens.models.probe`), then checked against the model's own logits: a norm, a scale or a softcap that was
missed would make every lens wrong without a sign of it. There is no Unembed that has not passed the check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalens.models import architectures
from metalens.models.capture import ResidualCapture, ResidualStreamError
from metalens.models.probe import FoundModule, Overrides, find_head_modules, is_matrix
from metalens.ops import Head, Norm, head_logits
from metalens.ops.weight import Weight
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidValueError

NormFunction = Callable[[mx.array], mx.array]

# The norm of a model without one, or of a lens told to skip it.
NO_NORM = Norm(lambda h: h, "none")


class UnembedError(InvalidValueError, AttributeError):
    """Norm and head were not found, or do not give the model's own logits."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the head, softcap(scale * z), and to the head's input.

    Attributes:
        scale: a factor of the head's input, of its output, or of both. With a bias in the head only the output's can be had.
        softcap: c of c * tanh(z / c), or None.
    """

    scale: float = 1.0
    softcap: float | None = None


class Unembed:
    """Norm and head of one model, checked.

    Attributes:
        norm: the final norm, a callable on [..., D].
        head: the unembedding's arrays.
        paths: where embedding, norm and head were found ("" for none, "(given)" for a module that the caller gave).
        tied: whether the head is the embedding.
        embedding_rows: token ids that the model knows, 0 <= id < embedding_rows; the head's rows if no embedding was found.
    """

    def __init__(self, norm: Norm, head: Head, paths: dict[str, str], tied: bool, embedding_rows: int) -> None:
        self.norm = norm
        self.head = head
        self.paths = paths
        self.tied = tied
        self.embedding_rows = embedding_rows

    @classmethod
    def from_model(
        cls, source: ResidualCapture | nn.Module, places: Overrides | None = None, logit_transform: LogitTransform | None = None
    ) -> Unembed:
        """Find the model's final norm and output head, and check them.

        Args:
            source: the model, or its residual streams.
            places: of its parts, where the caller knows better.
            logit_transform: what happens to the logits; None = found out.

        Raises:
            UnembedError: if there is no head, or the model's own logits do not follow from its last block's output; with what was found, where it
                differs, and what to do.
        """
        source = source if isinstance(source, ResidualCapture) else ResidualCapture(source)
        try:
            search = _Search(source, places or Overrides(), logit_transform)
            search.check()
        except (UnembedError, ResidualStreamError) as error:
            kind = architectures.model_type(source.model)
            reason = architectures.REASONS.get(kind)
            raise UnembedError(f"A lens can't read this model ({kind}): {reason}. {error}" if reason else str(error)) from error
        return search.unembed

    @property
    def hidden_dim(self) -> int:
        """D: the width of the residual stream."""
        return self.head.weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """V: rows of the head, whatever the tokenizer says."""
        return self.head.vocab_size

    def __call__(self, h: mx.array) -> mx.array:
        """Logits [..., V] float32 of a residual stream [..., D]."""
        return head_logits(self.norm(h), self.head)


def norm_of(module: Any) -> Norm:
    """A norm of the model as the operations take it. Exact types only: a subclass computes something of its own."""
    if type(module) is nn.RMSNorm:
        return Norm(module, "rms", module["weight"], None, module.eps)
    if type(module) is nn.LayerNorm:
        return Norm(module, "layer", module.get("weight"), module.get("bias"), module.eps)
    return _probed(module)


def _probed(module: Any) -> Norm:
    """A norm under another name (Gemma's and Nemotron's multiply with 1 + w), recognized by what it does; or just a function."""
    if not isinstance(module, nn.Module) or "weight" not in module or module["weight"].ndim != 1:
        return Norm(module)
    weight, bias = module["weight"], module.get("bias")
    eps = next((value for name in ("eps", "variance_epsilon") if isinstance(value := getattr(module, name, None), float)), None)
    if eps is None:
        return Norm(module)
    rows = mx.random.normal((4, weight.size), key=mx.random.key(0)) * mx.array([[0.01], [0.1], [1.0], [10.0]])
    for gain in (1.0 + weight, weight):
        if mx.array_equal(module(rows), mx.fast.rms_norm(rows, gain, eps)):
            return Norm(module, "rms", gain, None, eps)
        if mx.array_equal(module(rows), mx.fast.layer_norm(rows, gain, bias, eps)):
            return Norm(module, "layer", gain, bias, eps)
    return Norm(module)


def merged(module: nn.Module) -> nn.Module:
    """The linear or embedding layer that an adapter and the layer inside it amount to; other layers as they are."""
    return module.fuse(dequantize=True) if hasattr(module, "fuse") else module


@dataclass(frozen=True)
class _Transform:
    """Factors of the head's input and of its output, and the softcap."""

    before: float
    after: float
    softcap: float | None


class _Search:
    """One search: the parts of a model made into an Unembed, and the arrays of the pass to compare with."""

    def __init__(self, source: ResidualCapture, places: Overrides, transform: LogitTransform | None) -> None:
        self.model = source.model
        self.parts = find_head_modules(source, places)
        self.logits, self.last = self.parts.stream.logits, self.parts.stream.hidden[-1]
        self.norm_call, self.head_call = self.parts.norm_call, self.parts.head_call
        if self.last.ndim != 3:
            raise UnembedError(f"The model's last block hands on {self.last.shape}, where one residual stream [B, T, D] is needed.{_ADVICE}")
        head, scale = self._head()
        norm_path = self._set_norm()
        self.where = f"{f'the norm at {norm_path!r}' if norm_path else 'no norm'} and the head at {head.path!r}"
        embedding = self.parts.embedding
        tied = (embedding is not None and head.module is embedding.module) or (self.head_call is not None and self.head_call.method == "as_linear")
        paths = {"embedding": embedding.path if embedding else "", "norm": norm_path, "head": "" if tied and places.head is None else head.path}
        matrix = merged(head.module)
        weight, vocabulary = Weight.from_layer(matrix), self.logits.shape[-1]
        rows = Weight.from_layer(merged(embedding.module)).shape[0] if embedding and is_matrix(embedding.module) else weight.shape[0]
        self.told = transform is not None  # then only the logits say whether it is right, not where the factor stands
        self.transform = self._transform(scale) if transform is None else _Transform(1.0, transform.scale, transform.softcap)
        used = vocabulary if vocabulary < weight.shape[0] and self.head_call is not None else None
        self.unembed = Unembed(
            self.norm, Head(weight, matrix.get("bias"), self.transform.before * self.transform.after, self.transform.softcap, used), paths, tied, rows
        )

    def _head(self) -> tuple[FoundModule, float]:
        """The head, and the factor of its logits where that is known beforehand."""
        kind = architectures.model_type(self.model)
        if self.parts.head is None and kind in architectures.ARRAYS:
            array, path, scale = architectures.ARRAYS[kind](self.model)
            layer = nn.Linear(1, 1, bias=False)
            layer.weight = array
            return FoundModule(layer, path), scale
        head = self.parts.head or self.parts.embedding  # some multiply with the embedding's weight as an array
        if head is None or not is_matrix(head.module):
            raise UnembedError(
                "Cannot find output projection layer: after its last block the model calls no linear layer or embedding that gives its "
                f"{self.logits.shape[-1]} logits, and no embedding before. It calls {self.parts.called()}. Say which layer it is with head."
            )
        return head, 1.0

    def _set_norm(self) -> str:
        """The norm's path; "" if there is none."""
        kind = architectures.model_type(self.model)
        if self.parts.norm is not None:
            self.norm = norm_of(self.parts.norm.module)
            return self.parts.norm.path
        if kind in architectures.FUNCTIONS:
            eps = architectures.FUNCTIONS[kind]({name: value for each in architectures.settings(self.model) for name, value in each.items()})
            self.norm = Norm(partial(mx.fast.rms_norm, weight=None, eps=eps), "rms", eps=eps)
            return "(a function)"
        self.norm = NO_NORM
        return ""

    def _transform(self, scale: float) -> _Transform:
        """What lies between the norm's result and the head, and between the head's result and the logits."""
        if self.head_call is None:
            return _Transform(1.0, scale, None)
        given, result = self.head_call.given, self.head_call.result[..., : self.logits.shape[-1]].astype(mx.float32)
        normed = self.norm(self.last) if self.norm_call is None else self.norm_call.result
        scales = {"": 1.0, **architectures.factors(self.model)}
        before, after, cap = 1.0, 1.0, None
        if not _equal(given, normed):
            before = _best({factor: normed.astype(mx.float32) * factor for factor in scales.values()}, given)
        if not _equal(self.logits, result):
            caps = [None, *architectures.softcaps(self.model).values()]
            ways = [(factor, softcap) for softcap in caps for factor in scales.values()]
            after, cap = _best({way: _transformed(result, *way) for way in ways}, self.logits)
        if before != 1.0 and "bias" in self.head_call.module:
            raise UnembedError(f"The head at {self.head_call.path!r} has a bias and a factor of its input, which no Head can express.")
        return _Transform(before, after, cap)

    def check(self) -> None:
        """Compare with the model's own logits (UnembedError if they differ)."""
        own, d = self.logits.astype(mx.float32), self.unembed.hidden_dim
        if self.last.shape[-1] != d:
            raise UnembedError(f"The model's residual stream is {self.last.shape}; {self.where} would need [B, T, {d}].{_ADVICE}")
        if to_float(mx.any(mx.isnan(own))):
            raise UnembedError("The model's own logits are NaN on ordinary tokens: its weights are damaged. Load or convert the model again.")
        found = self.unembed(self.last)
        if own.shape[-1] != self.unembed.head.tokens:
            raise UnembedError(f"With {self.where} the logits are {found.shape}; the model's are {own.shape}.{_ADVICE}")
        found = found[..., : own.shape[-1]]
        difference = to_float(mx.max(mx.abs(found - own)))
        spread = to_float(mx.max(mx.abs(own - mx.mean(own, axis=-1, keepdims=True))))
        # 16-bit activations carry 8 or 11 bits, from the norm on; what is smaller than that is found between the calls.
        tolerance = (1e-3 if {self.logits.dtype, self.last.dtype} == {mx.float32} else 0.05) * spread + 1e-5
        unexplained = self._unexplained()
        if unexplained or not difference <= tolerance:
            raise UnembedError(
                f"The model's logits do not follow from its last block's output with {self.where}: they are off by up to {difference:.3g}, "
                f"where the logits spread over {spread:.3g}. {unexplained or f'After its last block the model calls {self.parts.called()}.'}{_ADVICE}"
            )

    def _unexplained(self) -> str:
        """Where the model does something between the calls that the Unembed does not, as far as the calls tell; "" if nowhere."""
        norm, head, transform = self.norm_call, self.head_call, self.transform
        stages: list[tuple[mx.array, float, float | None, mx.array, str]] = []
        if norm is not None and self.parts.norm is not None and self.parts.norm.module is norm.module:
            stages.append((self.last, 1.0, None, norm.given, f"the input of {norm.path!r} is not the last block's output"))
            if head is not None and not self.told:
                stages.append((norm.result, transform.before, None, head.given, f"the input of {head.path!r} is not the output of {norm.path!r}"))
        if head is not None and not self.told:
            result = head.result[..., : self.logits.shape[-1]]
            stages.append((result, transform.after, transform.softcap, self.logits, f"the logits are not the output of {head.path!r}"))
        for before, scale, softcap, after, what in stages:
            if not _explains(before, scale, softcap, after):
                return f"The first difference: {what}{_factor(after, before)}."
        return ""


_ADVICE = " Say what the model does with norm, head and logit_transform."


def _equal(a: mx.array, b: mx.array) -> bool:
    """To the last bit, in whatever type."""
    return a.shape == b.shape and bool(to_float(mx.array_equal(a.astype(mx.float32), b.astype(mx.float32), equal_nan=True)))


def _explains(x: mx.array, scale: float, softcap: float | None, y: mx.array) -> bool:
    """Whether y is softcap(scale * x) but for rounding: to the last bit if that is x itself, else within four roundings and without a tendency."""
    if scale == 1.0 and softcap is None:
        return _equal(x, y)
    if x.shape != y.shape:
        return False
    found, rounding = y.astype(mx.float32), max(_ROUNDING.get(dtype, 0.0) for dtype in (x.dtype, y.dtype))
    for operand in (x, x.astype(mx.float32)):  # a model that multiplies with 1/6 rounds that too; one that divides by 6 does not
        expected = _transformed(operand, scale, softcap).astype(mx.float32)
        worst = to_float(mx.max(mx.abs(found - expected) - 4 * rounding * mx.abs(expected)))
        tendency = abs(to_float(mx.sum((found - expected) * mx.sign(expected)))) / (to_float(mx.sum(mx.abs(expected))) + 1e-30)
        if worst <= 1e-6 and tendency <= rounding / 8 + 1e-6:
            return True
    return False


# Relative, of one number.
_ROUNDING = {mx.bfloat16: 2.0**-8, mx.float16: 2.0**-11, mx.float32: 2.0**-23}


def _factor(a: mx.array, b: mx.array) -> str:
    """In words, if a is a multiple of b."""
    if a.shape != b.shape:
        return f", which is {b.shape} and not {a.shape}"
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    factor = to_float(mx.sum(a * b) / mx.sum(b * b))
    left = to_float(mx.max(mx.abs(a - factor * b)))
    return f", but {factor:.6g} times that" if left <= 1e-3 * to_float(mx.max(mx.abs(a))) else ""


def _best(candidates: dict[Any, mx.array], wanted: mx.array) -> Any:
    """The key of the candidate that is nearest; of equals the first."""
    differences = {key: to_float(mx.max(mx.abs(value - wanted.astype(mx.float32)))) for key, value in candidates.items()}
    return min(differences, key=lambda key: differences[key])


def _transformed(z: mx.array, scale: float, softcap: float | None) -> mx.array:
    z = z * scale
    return z if softcap is None else softcap * mx.tanh(z / softcap)
