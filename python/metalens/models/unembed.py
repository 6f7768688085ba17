"""From hidden states to logits as the model itself computes them: final norm, head, logit transform.

The modules are those that the model is observed to call (`metalens.models.probe`), whatever their names. Then the result is compared with
the model's own logits, because a norm, a scale or a softcap that was missed would make every lens wrong without a sign. Every `Unembed`
that `Unembed.from_model` returns has passed this check.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalens.models import architectures
from metalens.models.acceleration import class_of
from metalens.models.capture import ResidualCapture, ResidualStreamError
from metalens.models.head_check import HeadTransform, Step, first_difference, infer_transform, logits_difference
from metalens.models.probe import FoundModule, HeadModules, Overrides, find_head_modules, is_matrix
from metalens.ops import Head, Norm, head_logits
from metalens.ops.weight import Weight
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidTypeError, InvalidValueError

NormFunction = Callable[[mx.array], mx.array]

# The norm of a model that has none, and of a lens that is told to skip it.
NO_NORM = Norm(lambda h: h, "none")


class UnembedError(InvalidValueError, AttributeError):
    """The norm and the head were not found, or they do not give the model's own logits."""


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the head, softcap(scale * z), and to the head's input.

    Attributes:
        scale: the product of the factors of the head's input and output. If the head has a bias, only its output may have a factor.
        softcap: c of c * tanh(z / c). None = no softcap.

    Raises:
        InvalidValueError: if `scale` is 0 or not finite, or `softcap` is not a positive number.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not _is_number(self.scale) or self.scale == 0:
            raise InvalidValueError(f"The scale of a LogitTransform must be a finite number other than 0, got {self.scale!r:.100}.")
        if self.softcap is not None and not (_is_number(self.softcap) and self.softcap > 0):
            raise InvalidValueError(f"The softcap of a LogitTransform must be a finite number above 0, or None for none, got {self.softcap!r:.100}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def checked_transform(given: Any) -> LogitTransform | None:
    """Return a caller's `logit_transform` (InvalidTypeError if it is none)."""
    if given is not None and not isinstance(given, LogitTransform):
        raise InvalidTypeError(f"logit_transform must be a LogitTransform(scale=..., softcap=...) or None, got {given!r:.100}.")
    return given


class Unembed:
    """The final norm and the head of one model.

    Attributes:
        norm: the final norm, a callable on [..., D].
        head: the arrays of the output head.
        paths: {"embedding", "norm", "head": dotted path}. "" = there is none. "(given)" = the caller gave the module.
        tied: whether the head is the embedding.
        embedding_rows: the number of token ids that the model knows, 0 <= id < embedding_rows. If no embedding was found, the rows of the head.
    """

    def __init__(self, norm: Norm, head: Head, paths: dict[str, str], tied: bool, embedding_rows: int) -> None:
        self.norm = norm
        self.head = head
        self.paths = paths
        self.tied = tied
        self.embedding_rows = embedding_rows

    @classmethod
    def from_model(
        cls, source: ResidualCapture | nn.Module, overrides: Overrides | None = None, logit_transform: LogitTransform | None = None
    ) -> Unembed:
        """Find the final norm and the output head of a model, and check that they give the model's own logits.

        Args:
            source: the model, or the capture of its hidden states.
            overrides: modules or paths to use instead of what the model is observed to call.
            logit_transform: what the model does to its logits. None = find out.

        Raises:
            UnembedError: if there is no head, or the model's own logits do not follow from the output of its last block. The error names what
                was found, where the first difference is, and what to do. Also if the given embedding is none.
            InvalidTypeError: if `logit_transform` is of another type.
        """
        source = source if isinstance(source, ResidualCapture) else ResidualCapture(source)
        overrides = overrides or Overrides()
        try:
            modules = find_head_modules(source, overrides)
            candidate = _assemble(source.model, modules, overrides, checked_transform(logit_transform))
            if failure := _failure(candidate):
                raise UnembedError(failure)
        except (UnembedError, ResidualStreamError) as error:
            kind = architectures.model_type(source.model)
            reason = architectures.REASONS.get(kind)
            raise UnembedError(f"A lens can't read this model ({kind}): {reason}. {error}" if reason else str(error)) from error
        return candidate.unembed

    @property
    def hidden_dim(self) -> int:
        """Return D, the width of the residual stream."""
        return self.head.weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """Return V, the rows of the head, which may differ from the tokenizer's size."""
        return self.head.vocab_size

    def __call__(self, h: mx.array) -> mx.array:
        """Return the logits [..., V] float32 of hidden states [..., D]."""
        return head_logits(self.norm(h), self.head)


# ---------------------------------------------------------------- from modules to an Unembed


@dataclass(frozen=True)
class _Candidate:
    """An Unembed before its check.

    Attributes:
        unembed: the Unembed.
        modules: the modules that it was made from, and the pass in which they were observed.
        steps: claims about the arrays of that pass.
        names: norm and head, for error messages.
    """

    unembed: Unembed
    modules: HeadModules
    steps: list[Step]
    names: str


def _assemble(model: nn.Module, modules: HeadModules, overrides: Overrides, logit_transform: LogitTransform | None) -> _Candidate:
    """Make an Unembed from the modules that were found."""
    states = modules.states
    if states.hidden[-1].ndim != 3:
        raise UnembedError(_no_single_stream(states.hidden[-1]))
    head, known_scale = _find_head(model, modules)
    norm, norm_path = _find_norm(model, modules)
    transform = _find_transform(model, modules, norm, known_scale, logit_transform)
    matrix = merged(head.module)
    weight = Weight.from_layer(matrix)
    vocabulary = states.logits.shape[-1]
    used_rows = vocabulary if modules.head_call is not None and vocabulary < weight.shape[0] else None
    embedding = modules.embedding
    rows = _embedding_rows(modules, given=overrides.embedding is not None) or weight.shape[0]
    tied = _is_tied(modules, head)
    paths = {"embedding": embedding.path if embedding else "", "norm": norm_path, "head": "" if tied and overrides.head is None else head.path}
    arrays = Head(weight, matrix.get("bias"), transform.input_scale * transform.output_scale, transform.softcap, used_rows)
    return _Candidate(
        Unembed(norm, arrays, paths, tied, rows),
        modules,
        _steps(modules, None if logit_transform is not None else transform),
        f"{f'the norm at {norm_path!r}' if norm_path else 'no norm'} and the head at {head.path!r}",
    )


def _embedding_rows(modules: HeadModules, given: bool) -> int:
    """Return the number of token ids that the embedding knows; 0 if none was found.

    Raises:
        UnembedError: if a given embedding is none, or has other rows than the one that the model calls: ids that are too large would read other
            memory.
    """
    embedding, own = modules.embedding, modules.embedding_call
    if embedding is None or not is_matrix(embedding.module):
        if given and embedding is not None:
            raise UnembedError(_no_embedding(embedding, "which has no matrix with a row for each token id"))
        return 0
    rows = int(Weight.from_layer(merged(embedding.module)).shape[0])
    if given and own is not None and (called := int(Weight.from_layer(merged(own.module)).shape[0])) != rows:
        raise UnembedError(_no_embedding(embedding, f"with {rows} rows, and the model calls {own.path!r}, with {called} rows"))
    return rows


def _find_head(model: nn.Module, modules: HeadModules) -> tuple[FoundModule, float]:
    """Return the head, and the factor of its output if the architecture tells it."""
    kind = architectures.model_type(model)
    if modules.head is None and kind in architectures.ARRAYS:
        array, path, scale = architectures.ARRAYS[kind](model)
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = array
        return FoundModule(layer, path), scale
    head = modules.head or modules.embedding  # some models multiply by the embedding's weight, without a call
    if head is None or not is_matrix(head.module):
        raise UnembedError(_no_head(modules))
    return head, 1.0


def _find_norm(model: nn.Module, modules: HeadModules) -> tuple[Norm, str]:
    """Return the norm and its path, "" if there is none."""
    if modules.norm is not None:
        return norm_of(modules.norm.module), modules.norm.path
    kind = architectures.model_type(model)
    if kind in architectures.FUNCTIONS:
        eps = architectures.FUNCTIONS[kind]({name: value for each in architectures.settings(model) for name, value in each.items()})
        return Norm(partial(mx.fast.rms_norm, weight=None, eps=eps), "rms", eps=eps), "(a function)"
    return NO_NORM, ""


def _find_transform(model: nn.Module, modules: HeadModules, norm: Norm, known_scale: float, given: LogitTransform | None) -> HeadTransform:
    """Return what the model does between norm, head and logits: as the caller says, or as the calls show."""
    if given is not None:
        return HeadTransform(1.0, given.scale, given.softcap)
    call = modules.head_call
    if call is None:
        return HeadTransform(1.0, known_scale)
    normed = norm(modules.states.hidden[-1]) if modules.norm_call is None else modules.norm_call.output
    found = infer_transform(normed, call, modules.states.logits, architectures.factors(model), architectures.softcaps(model))
    if found.input_scale != 1.0 and "bias" in call.module:
        raise UnembedError(_bias_and_input_scale(call.path))
    return found


def _is_tied(modules: HeadModules, head: FoundModule) -> bool:
    is_embedding = modules.embedding is not None and head.module is modules.embedding.module
    return is_embedding or (modules.head_call is not None and modules.head_call.method == "as_linear")


def _steps(modules: HeadModules, transform: HeadTransform | None) -> list[Step]:
    """Return what an Unembed claims about the arrays between the calls.

    Args:
        modules: the calls.
        transform: what happens to the head's input and output. None = the caller gave one, and it does not say where its factor belongs.
    """
    norm, head, states = modules.norm_call, modules.head_call, modules.states
    steps = []
    if norm is not None and modules.norm is not None and modules.norm.module is norm.module:
        steps.append(Step(states.hidden[-1], norm.input, f"the input of {norm.path!r} is not the last block's output"))
        if head is not None and transform is not None:
            denial = f"the input of {head.path!r} is not the output of {norm.path!r}"
            steps.append(Step(norm.output, head.input, denial, transform.input_scale))
    if head is not None and transform is not None:
        output = head.output[..., : states.logits.shape[-1]]
        denial = f"the logits are not the output of {head.path!r}"
        steps.append(Step(output, states.logits, denial, transform.output_scale, transform.softcap))
    return steps


def _failure(candidate: _Candidate) -> str:
    """Return why an Unembed does not give the model's own logits; "" if it does."""
    states, unembed = candidate.modules.states, candidate.unembed
    last, own = states.hidden[-1], states.logits.astype(mx.float32)
    if last.shape[-1] != unembed.hidden_dim:
        return _wrong_width(candidate, last)
    if to_float(mx.any(mx.isnan(own))):
        return _damaged("NaN")
    if not to_float(mx.all(mx.isfinite(mx.max(own, axis=-1)))):  # some tokens may be -inf, but not all
        return _damaged("infinite")
    found = unembed(last)
    if own.shape[-1] != unembed.head.tokens:
        return _wrong_vocabulary(candidate, found, own)
    exact = {states.logits.dtype, last.dtype} == {mx.float32}
    difference, spread, is_rounding = logits_difference(found[..., : own.shape[-1]], own, exact)
    where = first_difference(candidate.steps)
    return "" if is_rounding and not where else _wrong_logits(candidate, difference, spread, where)


# ---------------------------------------------------------------- norms and adapters


def norm_of(module: Any) -> Norm:
    """Return a norm of the model in the form that the operations take. Only exact types count: a subclass computes something else."""
    kind = class_of(module) if isinstance(module, nn.Module) else None
    if kind is nn.RMSNorm:
        return Norm(module, "rms", module["weight"], None, module.eps)
    if kind is nn.LayerNorm:
        return Norm(module, "layer", module.get("weight"), module.get("bias"), module.eps)
    return _recognized(module)


def _recognized(module: Any) -> Norm:
    """Recognize a norm of another class by its results (Gemma's and Nemotron's multiply by 1 + weight). Else return it as a function."""
    if not isinstance(module, nn.Module) or "weight" not in module or module["weight"].ndim != 1:
        return Norm(module)
    weight, bias = module["weight"], module.get("bias")
    eps = next((value for name in ("eps", "variance_epsilon") if isinstance(value := getattr(module, name, None), float)), None)
    if eps is None:
        return Norm(module)
    rows = mx.random.normal((4, weight.size), key=mx.random.key(0)) * mx.array([[0.01], [0.1], [1.0], [10.0]])
    plain = class_of(module).__call__(module, rows)  # the native kernels round otherwise
    for gain in (1.0 + weight, weight):
        if mx.array_equal(plain, mx.fast.rms_norm(rows, gain, eps)):
            return Norm(module, "rms", gain, None, eps)
        if mx.array_equal(plain, mx.fast.layer_norm(rows, gain, bias, eps)):
            return Norm(module, "layer", gain, bias, eps)
    return Norm(module)


def merged(module: nn.Module) -> nn.Module:
    """Return an adapter (LoRA) merged with the linear or embedding layer inside it. Return other layers as they are."""
    inner = module.get("linear")
    if type(module).__name__ == "LoRALinear" and isinstance(inner, nn.QuantizedLinear) and inner.mode != "affine":
        # Weights of these modes unpack to bfloat16, and `fuse` would round the sum to it.
        scaled = mx.dequantize(inner.weight, inner.scales, None, inner.group_size, inner.bits, inner.mode).astype(mx.float32)
        fused = nn.Linear(1, 1, bias="bias" in inner)
        fused.weight = scaled + (module.scale * module.lora_b.T) @ module.lora_a.T
        if "bias" in inner:
            fused.bias = inner.bias
        return fused
    return module.fuse(dequantize=True) if hasattr(module, "fuse") else module


# ---------------------------------------------------------------- messages

_ADVICE = " Pass norm=, head= or logit_transform= to describe the model's output layers."


def _damaged(numbers: str) -> str:
    return (
        f"The model's own logits are {numbers} on ordinary tokens: its weights are damaged, or the model is float16 and its activations overflow. "
        "Convert it to bfloat16 (mlx_lm.convert --dtype bfloat16), or load it again."
    )


def _no_single_stream(last: mx.array) -> str:
    return f"The model's last block returns {last.shape}; a lens needs one residual stream [B, T, D].{_ADVICE}"


def _no_head(modules: HeadModules) -> str:
    return (
        "Cannot find output projection layer: after its last block the model calls no linear layer or embedding that gives its "
        f"{modules.states.logits.shape[-1]} logits, and it calls no embedding before its first block. "
        f"It calls {modules.called()}. Pass head= to name the layer."
    )


def _no_embedding(given: FoundModule, fault: str) -> str:
    return (
        f"The embedding at {given.path!r} is a {type(given.module).__name__.lstrip('_')}, {fault}. "
        "Give the path of the embedding, or leave embedding_path out: the one that the model calls is taken then."
    )


def _bias_and_input_scale(path: str) -> str:
    return f"The head at {path!r} has a bias, and the model scales its input; metalens cannot express both together."


def _wrong_width(candidate: _Candidate, last: mx.array) -> str:
    return f"The model's residual stream is {last.shape}; {candidate.names} need [B, T, {candidate.unembed.hidden_dim}].{_ADVICE}"


def _wrong_vocabulary(candidate: _Candidate, found: mx.array, own: mx.array) -> str:
    return f"With {candidate.names} the logits are {found.shape}; the model's are {own.shape}.{_ADVICE}"


def _wrong_logits(candidate: _Candidate, difference: float, spread: float, where: str) -> str:
    where = where or f"After its last block the model calls {candidate.modules.called()}."
    return (
        f"The model's logits do not follow from its last block's output with {candidate.names}: they are off by up to {difference:.3g}, "
        f"and the logits spread over {spread:.3g}. {where}{_ADVICE}"
    )
