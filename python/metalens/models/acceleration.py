"""accelerate(model): run a model's linear layers, tied heads, attention and gated activations on the native CPU kernels.

MLX's CPU matmul on Linux links a reference BLAS and runs at about 1 GFLOP/s, hundreds of times below what the processor can do; a lens run would
spend nearly all its time there. A layer is switched by exchanging its class for a subclass with another `__call__`: parameters, names, training mode
and `isinstance` stay as they are, and undoing it is exchanging the class back.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, TracebackType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu as mlx_lm_swiglu
from mlx_lm.models.base import scaled_dot_product_attention

from metalens.ops.activation import swiglu
from metalens.ops.matmul import linear
from metalens.ops.sdpa import attention
from metalens.ops.weight import Weight
from metalens.utils.errors import InvalidTypeError

Function = Callable[..., Any]


class _NativeCall(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        y = linear(x, Weight.from_layer(self))
        return y + self["bias"] if "bias" in self else y


class _NativeHead(nn.Module):
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


# Exact types only: a subclass (LoRA, a sharded layer) has a `__call__` of its own, which must keep running.
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _Linear,
    nn.QuantizedLinear: _QuantizedLinear,
    nn.Embedding: _Embedding,
    nn.QuantizedEmbedding: _QuantizedEmbedding,
}


def _attention_like(plain: Function) -> Function:
    """Our attention with the signature of mlx-lm's."""

    def ours(queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: mx.array | None = None) -> Any:
        # A quantized cache hands over packed keys; a single query is bound by reading the keys once, which plain MLX does as fast.
        if hasattr(cache, "bits") or queries.shape[2] == 1:
            return plain(queries, keys, values, cache, scale, mask, sinks)
        return attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)

    return ours


# {name in the module that defines a layer: (mlx-lm's function, ours)}: what their layers call between the products, and is slow on CPUs.
REBOUND: dict[str, tuple[Function, Function]] = {
    "scaled_dot_product_attention": (scaled_dot_product_attention, _attention_like(scaled_dot_product_attention)),
    "swiglu": (mlx_lm_swiglu, swiglu),
}


def _rebound(original: type[nn.Module]) -> type[nn.Module] | None:
    """A subclass whose `__call__` is the original's own code with our functions under the names of mlx-lm's; None if that code calls none of them.

    Nothing global is patched, so other models and threads go on as before.
    """
    call = original.__call__
    if not isinstance(call, FunctionType):
        return None
    names = {name: ours for name, (plain, ours) in REBOUND.items() if name in call.__code__.co_names and call.__globals__.get(name) is plain}
    if not names:
        return None
    ours = FunctionType(call.__code__, {**call.__globals__, **names}, call.__name__, call.__defaults__, call.__closure__)
    ours.__kwdefaults__ = call.__kwdefaults__
    return type(original.__name__, (original,), {"__call__": ours, "__module__": original.__module__})


class Acceleration:
    """What `accelerate` did. `undo()` takes it back; so does leaving a `with` block."""

    def __init__(self, swapped: list[tuple[nn.Module, type[nn.Module]]]) -> None:
        self._swapped = swapped

    def __len__(self) -> int:
        """How many layers now run on the native kernels because of this call."""
        return len(self._swapped)

    def undo(self) -> None:
        """Give every layer its own class back. Calling it again does nothing."""
        while self._swapped:
            layer, original = self._swapped.pop()
            layer.__class__ = original

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


def accelerate(model: nn.Module) -> Acceleration:
    """Switch the model's linear layers, tied-embedding heads, attention and gated activations to metalens's operations, in place.

    On the CPU these run the native kernels; on a GPU, with METALENS_BACKEND=reference or without the extension they are plain MLX, as before.
    Outputs equal the original's within rounding (the native kernels accumulate in float32).

    Args:
        model: any `mlx.nn.Module`. Layers that are already switched, or of a subclass with its own `__call__`, are left alone.

    Returns:
        An `Acceleration`, whose `undo()` restores the model.

    Raises:
        TypeError: if model is not an `mlx.nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(f"accelerate() needs an mlx.nn.Module, not {type(model).__name__}. For an InterpretableModel pass its .model.")
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    swaps: dict[type[nn.Module], type[nn.Module] | None] = dict(SWAPS)
    for _, layer in model.named_modules():
        original = type(layer)
        if original not in swaps:
            swaps[original] = _rebound(original)
        swap = swaps[original]
        if swap is not None:
            layer.__class__ = swap
            swapped.append((layer, original))
    return Acceleration(swapped)
