"""Compute x W^T (or x W) with a W of one of the formats that models have."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from benchmarks.competitor import TORCH_BF16, TORCH_INT4, Competitor, LeftOutError, mlx_competitor, tensor, torch_competitor, torch_module
from benchmarks.operations.lens import dense, random_weight

from metalens.ops import Weight, linear

# Formats of W by name: an element type, or (bits, group size).
FORMATS: dict[str, mx.Dtype | tuple[int, int]] = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "4 bits in groups of 32": (4, 32),
    "4 bits": (4, 64),
    "8 bits": (8, 64),
}
# Formats that only one row is timed in.
ROW_FORMATS: dict[str, mx.Dtype | tuple[int, int] | str] = {
    **FORMATS,
    **{f"{bits} bits": (bits, 64) for bits in (2, 3, 5, 6)},
    **{mode: mode for mode in ("mxfp4", "nvfp4", "mxfp8")},
}


def make(name: str, rows: int, inputs: int, outputs: int, transpose: bool = True, stored: str = "4 bits") -> Competitor:
    """Return a competitor for W [outputs, inputs] and x [rows, inputs], or x [rows, outputs] with transpose=False.

    `stored` names the format of W in ROW_FORMATS. PyTorch gets the same numbers as float32 or bfloat16.
    """
    rng = np.random.default_rng(0)
    w = _in_format(random_weight(rng, outputs, inputs, inputs**-0.5), ROW_FORMATS[stored])
    x = mx.array(rng.standard_normal((rows, inputs if transpose else outputs)).astype(np.float32))
    mx.eval(x)
    if name == TORCH_INT4:
        return _torch_int4(x, w, transpose)
    if name.startswith("PyTorch"):
        torch = torch_module()
        dtype = torch.bfloat16 if name == TORCH_BF16 else torch.float32
        matrix, rows_in = tensor(w.values if w.scales is None else dense(w)).to(dtype), tensor(x).to(dtype)
        return torch_competitor(rows, lambda count: [rows_in[:count] @ (matrix.T if transpose else matrix)])
    # A slice is an operation of its own in MLX, and a view in PyTorch.
    return mlx_competitor(name, rows, lambda count: [linear(x if count == rows else x[:count], w, transpose, mx.float32)])


def stored_bytes(stored: str, outputs: int, inputs: int) -> float:
    """Return the bytes of a matrix in a format of ROW_FORMATS, scales and biases of 16 bits included."""
    kept = ROW_FORMATS[stored]
    if isinstance(kept, str):
        return outputs * inputs * {"mxfp4": 4 / 8 + 1 / 32, "nvfp4": 4 / 8 + 1 / 16, "mxfp8": 8 / 8 + 1 / 32}[kept]
    if isinstance(kept, tuple):
        bits, group_size = kept
        return outputs * inputs * (bits / 8 + 4 / group_size)
    return outputs * inputs * kept.size


def _in_format(w: Weight, stored: mx.Dtype | tuple[int, int] | str) -> Weight:
    """Return a 4-bit weight in another format."""
    values = dense(w)
    if isinstance(stored, str):
        codes, scales = mx.quantize(values, mode=stored)
        mx.eval(codes, scales)
        return Weight(codes, scales, None, 16 if stored == "nvfp4" else 32, 8 if stored == "mxfp8" else 4, stored)
    if not isinstance(stored, tuple):
        other = Weight(values.astype(stored))
        mx.eval(other.values)
        return other
    bits, group_size = stored
    if (bits, group_size) == (w.bits, w.group_size):
        return w
    packed = mx.quantize(values.astype(mx.bfloat16), group_size, bits)  # scales and biases have the type of the values
    mx.eval(packed)
    return Weight(*packed, group_size, bits)


def _torch_int4(x: mx.array, w: Weight, transpose: bool) -> Competitor:
    """Return a competitor that runs PyTorch's own kernel for 4-bit weights.

    It stores w = (code - 8) scale + zero, with groups along the columns as in MLX.
    """
    torch = torch_module()
    if not transpose:
        raise LeftOutError("PyTorch's int4 kernel multiplies with W^T only.")
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        raise LeftOutError("This PyTorch has no int4 kernel for CPUs.")
    outputs, inputs = w.shape
    ones = mx.ones((outputs, inputs // w.group_size))
    codes = tensor(mx.dequantize(w.values, ones, mx.zeros_like(ones), w.group_size, w.bits)).to(torch.int32)
    assert w.scales is not None
    assert w.biases is not None
    scales, biases = tensor(w.scales), tensor(w.biases)
    scales_and_zeros = torch.stack([scales.T, (biases + 8 * scales).T], dim=-1).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    rows_in = tensor(x)
    return torch_competitor(
        x.shape[0], lambda count: [torch.ops.aten._weight_int4pack_mm_for_cpu(rows_in[:count], packed, w.group_size, scales_and_zeros)]
    )
