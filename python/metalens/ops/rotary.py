"""rope: rotary position embedding of queries and keys. MLX runs it on CPUs as a chain of elementwise operations."""

from __future__ import annotations

import mlx.core as mx

from metalens.ops.backends import extension
from metalens.ops.dispatch import Operation
from metalens.ops.weight import FLOATS


def rope(
    x: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array = 0,
    freqs: mx.array | None = None,
) -> mx.array:
    """Return `mlx.core.fast.rope` of the same arguments. Lazy; the gradient is plain MLX's.

    Args:
        x: [..., T, D] queries or keys.
        dims: how many elements of each row rotate, an even number; the rest stays.
        traditional: True if neighbors rotate together; False if element i and element i + dims / 2 do.
        base: the angles of position t are t * scale / base^(2 i / dims); None if there are `freqs`.
        scale: factor of the positions.
        offset: the first position. Only plain MLX takes an array here.
        freqs: [dims / 2] periods in place of base^(2 i / dims), or None.

    Returns:
        An array of the same shape and type. The native kernels compute the angles in float64 and round the result once.
    """
    return _ROPE(x, dims, traditional, base, scale, offset, freqs)


def _reference(
    x: mx.array, dims: int, traditional: bool, base: float | None, scale: float, offset: int | mx.array, freqs: mx.array | None
) -> mx.array:
    return mx.fast.rope(x, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs)


def _native(x: mx.array, dims: int, traditional: bool, base: float | None, scale: float, offset: int | mx.array, freqs: mx.array | None) -> mx.array:
    y: mx.array = extension().rope(x, dims, traditional, base, scale, offset, freqs)
    return y


def _why_not_native(
    x: mx.array, dims: int, traditional: bool, base: float | None, scale: float, offset: int | mx.array, freqs: mx.array | None
) -> str:
    if isinstance(offset, mx.array):
        return "the kernels take no array of offsets"
    if x.ndim < 3 or dims % 2 or not 2 <= dims <= x.shape[-1] or (base is None) == (freqs is None):
        return "the kernels do not know this rotation"  # plain MLX says what is wrong, if anything is
    if freqs is not None and (freqs.shape != (dims // 2,) or freqs.dtype not in FLOATS):
        return f"the kernels read no freqs of {freqs.dtype} {freqs.shape}"
    return "" if x.dtype in FLOATS else f"the kernels read no x of {x.dtype}"


_ROPE = Operation("rope", _reference, native=(_why_not_native, _native))
