"""A Metal kernel as plain data, and its launch: just in time through `mx.fast.metal_kernel`, or ahead of time from the extension's metallib.

One descriptor serves both, and the tests' emulation, so what is tested is what is launched. The kernel's body is made mechanically from it: declare
the threadgroup memory, call the function of the header with the arguments in their order. Both launchers bind inputs, then outputs, in that order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import mlx.core as mx

from metalens import _extension
from metalens.ops.metal.source import inlined

# Inputs of fewer elements are bound to `constant` memory by mx.fast.metal_kernel; the functions take `device` pointers.
FEWEST = 8

# The names that MLX turns into arguments of a kernel, with their types, in the order in which every function of metal/ takes those it uses.
PLACES = {
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "simdgroup_index_in_threadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
}
GROUP, GROUPS, SIMD, LANE = PLACES


@dataclass(frozen=True)
class Argument:
    """A buffer: its name and the Metal type of its elements."""

    name: str
    element: str


@dataclass(frozen=True)
class Kernel:
    """One specialization of one kernel.

    Attributes:
        function: the template in metal/.
        header: the file that defines it.
        arguments: the template's arguments, as they stand between < and >.
        label: these once more, fit for a name.
        inputs, outputs: buffers in the order of the function's parameters.
        shared: floats of threadgroup memory, an expression; "" for none.
        groups: whether the function wants to know the size of the grid.
        threads: of a threadgroup.
    """

    function: str
    header: str
    arguments: tuple[str, ...]
    label: str
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    shared: str = ""
    groups: bool = False
    threads: int = 128

    @property
    def name(self) -> str:
        """Spells the specialization: the key of caches, and what traces and error messages show."""
        return f"metalens_{self.function}" + (f"_{self.label}" if self.label else "")

    @property
    def places(self) -> tuple[str, ...]:
        """What the function asks about the thread."""
        return (GROUP, GROUPS, SIMD, LANE) if self.groups else (GROUP, SIMD, LANE)

    @property
    def body(self) -> str:
        """The kernel between its braces."""
        template = f"<{', '.join(self.arguments)}>" if self.arguments else ""
        memory = f"threadgroup float shared_floats[{self.shared}];\n" if self.shared else ""
        passed = [a.name for a in (*self.inputs, *self.outputs)] + (["shared_floats"] if self.shared else []) + list(self.places)
        return f"{memory}metalens::{self.function}{template}({', '.join(passed)});\n"

    @property
    def definition(self) -> str:
        """The whole kernel, for a library: with the signature that mx.fast.metal_kernel generates for it."""
        buffers = [f"const device {a.element}* {a.name}" for a in self.inputs] + [f"device {a.element}* {a.name}" for a in self.outputs]
        parameters = [f"  {text} [[buffer({i})]]" for i, text in enumerate(buffers)] + [f"  {PLACES[p]} {p} [[{p}]]" for p in self.places]
        return f"[[kernel]] void {self.name}(\n" + ",\n".join(parameters) + f") {{\n{self.body}}}\n"


# What makes a kernel from its source, in mx.fast.metal_kernel's manner. The tests put an emulation in its place.
factory: Callable[..., Any] | None = None


@cache
def _just_in_time(kernel: Kernel, make: Callable[..., Any]) -> Callable[..., Any]:
    inputs, outputs = ([a.name for a in arguments] for arguments in (kernel.inputs, kernel.outputs))
    made = make(name=kernel.name, input_names=inputs, output_names=outputs, source=kernel.body, header=inlined(kernel.header))
    return cast("Callable[..., Any]", made)


def launch(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    groups: tuple[int, int, int],
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[mx.Dtype],
    reuse: Sequence[int] | None = None,
) -> list[mx.array]:
    """Run a kernel. Lazy.

    Args:
        kernel: the descriptor.
        inputs: as many as it names; small ones are padded to eight elements.
        groups: threadgroups in x, y and z.
        shapes, dtypes: of the outputs.
        reuse: for each output, the index of an input whose memory it may take over if nobody else needs it, or -1. Ahead of time only: MLX's
            just-in-time kernels cannot.
    """
    inputs = [_long_enough(a) for a in inputs]
    threadgroup = (kernel.threads, 1, 1)
    grid = (groups[0] * kernel.threads, groups[1], groups[2])
    if factory is None and (extension := _library_with(kernel.name)) is not None:
        return list(
            extension.launch_metal(kernel.name, inputs, list(map(tuple, shapes)), list(dtypes), grid, threadgroup, list(reuse or [-1] * len(shapes)))
        )
    run = _just_in_time(kernel, factory or mx.fast.metal_kernel)
    made = run(inputs=inputs, grid=grid, threadgroup=threadgroup, output_shapes=list(map(tuple, shapes)), output_dtypes=list(dtypes))
    return cast("list[mx.array]", made)


def _long_enough(a: mx.array) -> mx.array:
    return a if a.size >= FEWEST else mx.concatenate([a.reshape(-1), mx.zeros(FEWEST - a.size, a.dtype)])


def _library_with(name: str) -> Any:
    """The extension, if its metallib holds this kernel."""
    return _extension.find()[0] if name in _extension.metallib_kernels() else None
