"""accelerate(model): run a model's linear layers and tied heads on the native CPU kernels.

MLX's CPU matmul on Linux links a reference BLAS and runs at about 1 GFLOP/s, hundreds of times below what the processor can do; a lens run would
spend nearly all its time there. A layer is switched by exchanging its class for a subclass with another `__call__`: parameters, names, training mode
and `isinstance` stay as they are, and undoing it is exchanging the class back.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType, TracebackType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalens.ops.attention import attention
from metalens.ops.linear import Weight, linear


def weight_of(layer: nn.Module) -> Weight:
    """The matrix of an `mlx.nn` linear or embedding layer, quantised or not."""
    if "scales" in layer:
        return Weight(layer["weight"], layer["scales"], layer.get("biases"), layer.group_size, layer.bits, getattr(layer, "mode", "affine"))
    return Weight(layer["weight"])


class _NativeCall(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        y = linear(x, weight_of(self))
        return y + self["bias"] if "bias" in self else y


class _NativeHead(nn.Module):
    def as_linear(self, x: mx.array) -> mx.array:
        return linear(x, weight_of(self))


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

# The function that mlx-lm's models call for attention, by this name, from the module that defines them.
ATTENTION = "scaled_dot_product_attention"


@cache
def _attentive(original: type[nn.Module]) -> type[nn.Module] | None:
    """A subclass whose `__call__` is the original's code with our attention under the name of mlx-lm's; None if that code does not call it."""
    call = original.__call__
    if not isinstance(call, FunctionType) or ATTENTION not in call.__code__.co_names or ATTENTION not in call.__globals__:
        return None
    plain = call.__globals__[ATTENTION]
    if getattr(plain, "is_native", False):
        return None  # such a subclass already

    def ours(queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: mx.array | None = None) -> mx.array:
        # A quantised cache hands over packed keys; a single query is bound by reading the keys once, which plain MLX does as fast.
        if hasattr(cache, "bits") or queries.shape[2] == 1:
            result: mx.array = plain(queries, keys, values, cache, scale, mask, sinks)
            return result
        return attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)

    ours.is_native = True  # type: ignore[attr-defined]
    rebound = FunctionType(call.__code__, {**call.__globals__, ATTENTION: ours}, call.__name__, call.__defaults__, call.__closure__)
    rebound.__kwdefaults__ = call.__kwdefaults__
    return type(original.__name__, (original,), {"__call__": rebound, "__module__": original.__module__})


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
    """Switch the model's linear layers and tied-embedding heads to metalens's operations, in place.

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
        raise TypeError(f"accelerate() needs an mlx.nn.Module, not {type(model).__name__}. For an InterpretableModel pass its .model.")
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    for _, layer in model.named_modules():
        original = type(layer)
        swap = SWAPS.get(original) or _attentive(original)
        if swap is not None:
            layer.__class__ = swap
            swapped.append((layer, original))
    return Acceleration(swapped)
