"""Generate the function signature of mx.fast.metal_kernel, and bind its parameters on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

# The attributes that MLX declares if the source contains their names, in MLX's order, and where the shim finds their values.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": ("uint", "(c->dispatch_simdgroups * 8)"),
    "dispatch_simdgroups_per_threadgroup": ("uint", "c->dispatch_simdgroups"),
    "dispatch_threads_per_threadgroup": ("uint3", "MslPosition{c->dispatch_threadgroup_size}"),
    "grid_origin": ("uint3", "MslPosition{(uint4)(0)}"),
    "grid_size": ("uint3", "MslPosition{c->grid}"),
    "quadgroup_index_in_threadgroup": ("uint", "(c->index_in_threadgroup / 4)"),
    "quadgroups_per_threadgroup": ("uint", "((c->threadgroup_size.x * c->threadgroup_size.y * c->threadgroup_size.z + 3) / 4)"),
    "simdgroup_index_in_threadgroup": ("uint", "c->simdgroup"),
    "simdgroups_per_threadgroup": ("uint", "c->simdgroups"),
    "thread_execution_width": ("uint", "32u"),
    "thread_index_in_quadgroup": ("uint", "(c->index_in_threadgroup % 4)"),
    "thread_index_in_simdgroup": ("uint", "c->lane"),
    "thread_index_in_threadgroup": ("uint", "c->index_in_threadgroup"),
    "thread_position_in_grid": ("uint3", "MslPosition{c->position_in_grid}"),
    "thread_position_in_threadgroup": ("uint3", "MslPosition{c->position_in_threadgroup}"),
    "threadgroup_position_in_grid": ("uint3", "MslPosition{c->threadgroup_position}"),
    "threadgroups_per_grid": ("uint3", "MslPosition{c->threadgroups}"),
    "threads_per_grid": ("uint3", "MslPosition{c->grid}"),
    "threads_per_simdgroup": ("uint", "32u"),
    "threads_per_threadgroup": ("uint3", "MslPosition{c->threadgroup_size}"),
}

TYPES = {
    mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.complex64: "complex64_t", mx.bool_: "bool",
    mx.int8: "int8_t", mx.int16: "int16_t", mx.int32: "int32_t", mx.int64: "int64_t",
    mx.uint8: "uint8_t", mx.uint16: "uint16_t", mx.uint32: "uint32_t", mx.uint64: "uint64_t",
}  # fmt: skip

CONSTANT_BELOW = 8  # elements


@dataclasses.dataclass(frozen=True)
class Input:
    """The properties of an input that the signature depends on."""

    name: str
    dtype: mx.Dtype
    size: int
    ndim: int


def shape_arguments(name: str, source: str) -> list[str]:
    """Return which of x_shape, x_strides, x_ndim the source mentions. Like MLX, search for substrings, and only in the source."""
    return [kind for kind in ("shape", "strides", "ndim") if f"{name}_{kind}" in source]


def template_text(value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return TYPES[value]
    return str(int(value))


def attributes_used(source: str) -> list[str]:
    return [name for name in ATTRIBUTES if name in source]


def write_signature(
    function: str,
    source: str,
    inputs: Sequence[Input],
    outputs: Sequence[tuple[str, mx.Dtype]],
    template: Sequence[tuple[str, Any]] = (),
    atomic_outputs: bool = False,
    restrict: bool = False,
) -> str:
    """Return the text from ``template <`` to the opening brace, exactly as MLX writes it.

    `restrict`: let the compiler assume that no two outputs or inputs overlap, as Apple's may do.
    """
    text = ""
    if template:
        kinds = ["typename" if isinstance(v, mx.Dtype) else "bool" if isinstance(v, bool) else "int" for _, v in template]
        text += f"template <{', '.join(f'{kind} {name}' for kind, (name, _) in zip(kinds, template, strict=True))}>\n"
    text += f"[[kernel]] void {function}(\n"
    index = 0
    for array in inputs:
        space = "constant" if array.size < CONSTANT_BELOW else "device"
        pointer = "&" if not array.ndim else "* __restrict" if restrict else "*"
        text += f"  const {space} {TYPES[array.dtype]}{pointer} {array.name} [[buffer({index})]],\n"
        index += 1
        for kind in shape_arguments(array.name, source) if array.ndim else ():
            declared = {"shape": "int*", "strides": "int64_t*", "ndim": "int&"}[kind]
            text += f"  const constant {declared} {array.name}_{kind} [[buffer({index})]],\n"
            index += 1
    attributes = attributes_used(source)
    for name, dtype in outputs:
        declared = f"atomic<{TYPES[dtype]}>" if atomic_outputs else TYPES[dtype]
        text += f"  device {declared}*{' __restrict' if restrict else ''} {name} [[buffer({index})]]"
        # MLX counts inputs and outputs here, but not shape arguments. Without attributes that can end the list too early; the same happens here.
        text += ",\n" if index < len(inputs) + len(outputs) - 1 or attributes else ") {\n"
        index += 1
    text += ",\n".join(f"  {ATTRIBUTES[name][0]} {name} [[{name}]]" for name in attributes)
    return text + (") {\n" if attributes else "")


def call_arguments(buffers: int, source: str) -> str:
    """Return the arguments with which the generated entry function calls the kernel."""
    arguments = [f"MslBuffer{{(ulong)c->buffers[{i}]}}" for i in range(buffers)]
    return ", ".join(arguments + [ATTRIBUTES[name][1] for name in attributes_used(source)])
