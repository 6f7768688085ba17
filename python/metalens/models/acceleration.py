"""Run a model's linear layers, tied heads, attention, norms, rotary positions and activations on the native CPU kernels.

MLX's CPU matmul on Linux uses a reference BLAS and reaches about 1 GFLOP/s, hundreds of times less than the processor can do. A lens would
spend nearly all its time there. A layer is switched by replacing its class with a subclass that has another `__call__`: parameters, names,
training mode and `isinstance` stay as they are, and the old class is put back to undo it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FunctionType, TracebackType
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import sum_gradients

from metalens import _extension
from metalens.ops.activation import gelu_approx, swiglu
from metalens.ops.backends import backend, native_by_default
from metalens.ops.matmul import linear
from metalens.ops.rotary import rope
from metalens.ops.row_norms import layer_norm, rms_norm
from metalens.ops.sdpa import attention
from metalens.ops.weight import Weight
from metalens.utils.errors import InvalidTypeError

Function = Callable[..., Any]


class HasModule(Protocol):
    """An object with an `mlx.nn.Module` in its attribute `model`, such as `LanguageModel` and `InterpretableModel`."""

    model: nn.Module


# Name of the class attribute that marks the classes which `accelerate` gives to layers.
_MARK = "_metalens_native"


def _linear_layer(layer: nn.Module, x: mx.array) -> mx.array:
    """Return x W^T + b. A dense W's sum is rounded once, as MLX's own layer rounds it; a quantized W's product and sum are rounded one by one."""
    weight = Weight.from_layer(layer)
    if "bias" not in layer:
        return linear(x, weight)
    bias: mx.array = layer["bias"]
    if weight.scales is not None or not native_by_default():
        return linear(x, weight) + bias
    dtype = mx.result_type(x, weight.values, bias)
    return (linear(x, weight, dtype=mx.float32) + bias).astype(dtype)


class _NativeCall(nn.Module):
    _metalens_native = True

    def __call__(self, x: mx.array) -> mx.array:
        return _linear_layer(self, x)


class _NativeHead(nn.Module):
    _metalens_native = True

    def as_linear(self, x: mx.array) -> mx.array:
        return linear(x, Weight.from_layer(self))


class _Linear(_NativeCall, nn.Linear):
    pass


class _QuantizedLinear(_NativeCall, nn.QuantizedLinear):
    pass


class _Embedding(_NativeHead, nn.Embedding):
    pass


class _QuantizedEmbedding(_NativeHead, nn.QuantizedEmbedding):
    pass


class _AllToSharded(nn.Module):
    """Tensor parallelism, first half: each process has some rows of the weight, and nothing is sent."""

    _metalens_native = True

    def __call__(self, x: mx.array) -> mx.array:
        return _linear_layer(self, sum_gradients(self.group)(x))


class _ShardedToAll(nn.Module):
    """Tensor parallelism, second half: each process has some columns of the weight, and the products are summed over the group."""

    _metalens_native = True

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.distributed.all_sum(linear(x, Weight.from_layer(self)), group=self.group)
        return y + self["bias"] if "bias" in self else y


class _AllToShardedLinear(_AllToSharded, nn.AllToShardedLinear):
    pass


class _QuantizedAllToShardedLinear(_AllToSharded, nn.QuantizedAllToShardedLinear):
    pass


class _ShardedToAllLinear(_ShardedToAll, nn.ShardedToAllLinear):
    pass


class _QuantizedShardedToAllLinear(_ShardedToAll, nn.QuantizedShardedToAllLinear):
    pass


# Exact types only: a subclass (LoRA) has a `__call__` of its own, which must keep running.
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear,
    nn.QuantizedLinear: _QuantizedLinear,
    nn.Embedding: _Embedding,
    nn.QuantizedEmbedding: _QuantizedEmbedding,
    nn.AllToShardedLinear: _AllToShardedLinear,
    nn.QuantizedAllToShardedLinear: _QuantizedAllToShardedLinear,
    nn.ShardedToAllLinear: _ShardedToAllLinear,
    nn.QuantizedShardedToAllLinear: _QuantizedShardedToAllLinear,
}


class _Namespace:
    """A module of functions, some of which are others here. Everything else is looked up in the module."""

    def __init__(self, module: Any, **others: Any) -> None:
        self.__dict__.update(others)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _sdpa(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: str | mx.array | None = None, sinks: mx.array | None = None, **options: Any
) -> mx.array:
    # A single query takes the time of reading the keys once, which plain MLX does as fast.
    if options or q.shape[2] == 1:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
    return attention(q, k, v, scale=scale, mask=mask, sinks=sinks)


def _attention_like(plain: Function) -> Function:
    """Return our attention with the signature of mlx-lm's."""

    def ours(queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: mx.array | None = None) -> Any:
        if hasattr(cache, "bits"):  # a quantized cache holds packed keys
            return plain(queries, keys, values, cache, scale, mask, sinks)
        return _sdpa(queries, keys, values, scale=scale, mask=mask, sinks=sinks)

    return ours


# (module of mlx-lm, name of a function in it, ours for the one there): functions that mlx-lm's layers call, and that are slow on CPUs.
FUNCTIONS: tuple[tuple[str, str, Callable[[Function], Function]], ...] = (
    ("mlx_lm.models.base", "scaled_dot_product_attention", _attention_like),
    ("mlx_lm.models.activations", "swiglu", lambda _: swiglu),
)

# Functions of mlx.core.fast and mlx.nn that layers call as `mx.fast.<name>` and `nn.<name>`, and ours for them.
_FAST: dict[str, Function] = {"rms_norm": rms_norm, "layer_norm": layer_norm, "rope": rope, "scaled_dot_product_attention": _sdpa}
_NN: dict[str, Function] = {"gelu_approx": gelu_approx}
_OUR_FAST = _Namespace(mx.fast, **_FAST)
_OUR_MX = _Namespace(mx, fast=_OUR_FAST)
_OUR_NN = _Namespace(nn, **_NN)


def _replacements() -> dict[str, tuple[Function, Function]]:
    """Return {name: (mlx-lm's function, ours)}. A model that calls these functions has imported mlx-lm, so nothing is imported here."""
    found = {}
    for module, name, ours_for in FUNCTIONS:
        plain = getattr(sys.modules.get(module), name, None)
        if plain is not None:
            found[name] = (plain, ours_for(plain))
    return found


def _with_functions(original: type[nn.Module], functions: dict[str, tuple[Function, Function]]) -> type[nn.Module] | None:
    """Return a subclass whose `__call__` is the original's own code with our functions in place of mlx-lm's and MLX's.

    Nothing global is changed, so other models and threads go on as before. None = the code calls none of the functions.
    """
    call = original.__call__
    if not isinstance(call, FunctionType):
        return None
    used, known = set(call.__code__.co_names), call.__globals__
    names: dict[str, Any] = {name: ours for name, (plain, ours) in functions.items() if name in used and known.get(name) is plain}
    if "fast" in used and used & _FAST.keys() and known.get("mx") is mx:
        names["mx"] = _OUR_MX
    if used & _NN.keys() and known.get("nn") is nn:
        names["nn"] = _OUR_NN
    if not names:
        return None
    ours = FunctionType(call.__code__, {**known, **names}, call.__name__, call.__defaults__, call.__closure__)
    ours.__kwdefaults__ = call.__kwdefaults__
    return type(original.__name__, (original,), {"__call__": ours, "__module__": original.__module__, _MARK: True})


def class_of(layer: nn.Module) -> type[nn.Module]:
    """Return the class that a layer has without acceleration."""
    return next(base for base in type(layer).__mro__ if not getattr(base, _MARK, False))


class Acceleration:
    """The layers that one call of `accelerate` has switched. `undo()` switches them back, and so does the end of a `with` block.

    Its `repr` says what it does now: '73 layers on native kernels (avx512bf16)', or why no layer runs on them.

    Args:
        swapped: (layer, its former class).
        reason: why there are no layers, if there are none.
    """

    def __init__(self, swapped: list[tuple[nn.Module, type[nn.Module]]], reason: str = "") -> None:
        self._swapped = swapped
        self._reason = reason

    def __len__(self) -> int:
        """Return the number of layers that this call has switched."""
        return len(self._swapped)

    def __repr__(self) -> str:
        if not self._swapped:
            return f"0 layers on native kernels ({self._reason})"
        if reason := reason_for_plain_mlx():
            return f"0 layers on native kernels ({reason}); {len(self)} layers are switched"
        extension, _ = _extension.find()
        return f"{len(self)} layers on native kernels ({extension.isa() if extension else ''})"

    def include(self, other: Acceleration) -> None:
        """Take over the layers of another call, so that `undo` restores them too."""
        self._swapped += other._swapped
        other._swapped = []

    def undo(self) -> None:
        """Give every layer its former class back. A second call does nothing."""
        while self._swapped:
            layer, original = self._swapped.pop()
            layer.__class__ = original
            self._reason = "undone"

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def reason_for_plain_mlx() -> str:
    """Return why layers that are switched run in plain MLX at present; "" if they run on the native kernels."""
    if native_by_default():
        return ""
    if backend() in ("reference", "metal"):
        return f"the backend is {backend()!r}"
    extension, reason = _extension.find()
    if extension is None:
        return f"there is no native extension: {reason}"
    return "the default device is not a CPU"


def accelerate(model: nn.Module | HasModule) -> Acceleration:
    """Switch a model's linear layers, tied heads, attention, norms, rotary positions and activations to metalens's operations, in place.

    On a CPU these run the native kernels. They run in plain MLX, as before, on a GPU, with METALENS_BACKEND=reference, or without the
    extension; this is decided at each call of a layer. Outputs equal the model's within rounding (the native kernels accumulate in float32).

    Args:
        model: any `mlx.nn.Module`, a `LanguageModel` or an `InterpretableModel`. Layers that are switched already, and layers of a subclass
            with its own `__call__`, stay as they are.

    Returns:
        An `Acceleration`: its `undo()` restores the model.

    Raises:
        InvalidTypeError: if `model` is none of these.
    """
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(module, nn.Module):
        raise InvalidTypeError(f"accelerate() needs an mlx.nn.Module, a LanguageModel or an InterpretableModel, not {type(model).__name__}.")
    functions = _replacements()
    swaps: dict[type[nn.Module], type[nn.Module] | None] = dict(SWAPS)
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    already = False
    for _, layer in module.named_modules():
        original = type(layer)
        if getattr(original, _MARK, False):
            already = True
            continue
        if original not in swaps:
            swaps[original] = _with_functions(original, functions)
        swap = swaps[original]
        if swap is not None:
            layer.__class__ = swap
            swapped.append((layer, original))
    return Acceleration(swapped, "all were switched before" if already else "the model has no layer for them")
