"""From a Metal kernel, as mx.fast.metal_kernel takes it, to the text of a CUDA kernel. The headers of metal/ are not changed beyond three edits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

# Values that MLX passes as arguments of a Metal kernel.
_POSITIONS = """\
  const uint3 threadgroup_position_in_grid(blockIdx.x, blockIdx.y, blockIdx.z), threadgroups_per_grid(gridDim.x, gridDim.y, gridDim.z);
  const uint simdgroup_index_in_threadgroup = threadIdx.x / 32, thread_index_in_simdgroup = threadIdx.x % 32;
"""
_UNROLL = re.compile(r'_Pragma\("clang loop unroll(?:_count)?\((full|disable|\d+)\)"\)')
_TIMES = {"full": "unroll", "disable": "unroll 1"}


@cache
def shim() -> str:
    """Return the text of metal_on_cuda.h, with the header that it includes."""
    main, numbers = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("metal_on_cuda.h", "numbers.h"))
    return main.replace('#include "numbers.h"\n', numbers).replace("#pragma once\n", "")


def translated(name: str, inputs: Sequence[tuple[str, str]], outputs: Sequence[tuple[str, str]], body: str, header: str) -> str:
    """Return the CUDA kernel.

    The edits: Metal's headers are left out, pragmas for loops get their names in CUDA, and the kernel's own threadgroup memory becomes __shared__.

    Args:
        name: the kernel's name, which stays as it is.
        inputs, outputs: (name, Metal type of the elements) of the buffers, in order.
        body, header: as mx.fast.metal_kernel takes them; the header with its includes inlined.
    """
    header = re.sub(r"^#include <metal_\w+>\n", "", header, flags=re.MULTILINE)
    header = _UNROLL.sub(lambda m: f'_Pragma("{_TIMES.get(m[1], f"unroll {m[1]}")}")', header)
    body = re.sub(r"^(\s*)threadgroup (\w+ \w+\[)", r"\1__shared__ \2", body, flags=re.MULTILINE)
    parameters = [f"const {element}* {buffer}" for buffer, element in inputs] + [f"{element}* {buffer}" for buffer, element in outputs]
    return f'{shim()}{header}\nextern "C" __global__ void {name}({", ".join(parameters)}) {{\n{_POSITIONS}{body}}}\n'
