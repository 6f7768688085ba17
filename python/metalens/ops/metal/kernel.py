"""A Metal kernel as plain data, and its launch: just in time through `mx.fast.metal_kernel`, or ahead of time from the extension's metallib.

One descriptor serves both launchers and the emulation in the tests, so the tests run what is launched. The body of a kernel follows mechanically from
its descriptor: declare the threadgroup memory, call the function of the header with the arguments in order. Both launchers bind inputs, then outputs,
in that order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import mlx.core as mx
import numpy as np

from metalens import _extension
from metalens.ops.metal import constants, tuning
from metalens.ops.metal.source import inlined

# mx.fast.metal_kernel binds inputs of fewer elements to `constant` memory; the functions take `device` pointers.
FEWEST = 8

# The names that MLX turns into arguments of a kernel, with their types, in the order in which every function of metal/ takes those that it uses.
THREAD_ATTRIBUTES = {
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "simdgroup_index_in_threadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
}
GROUP, GROUPS, SIMD, LANE = THREAD_ATTRIBUTES


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
        label: the template's arguments in a form that fits a name.
        inputs, outputs: the buffers, in the order of the function's parameters.
        shared: floats of threadgroup memory, an expression; "" for none. It is declared in vectors of 16 bytes, which the kernels store.
        groups: whether the function takes the size of the grid.
        threads: threads of a threadgroup.
    """

    function: str
    header: str
    arguments: tuple[str, ...]
    label: str
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    shared: str = ""
    groups: bool = False
    threads: int = field(default_factory=lambda: constants.THREADS)

    @property
    def name(self) -> str:
        """The name of the specialization: the key of caches, shown in traces and error messages."""
        return f"metalens_{self.function}" + (f"_{self.label}" if self.label else "")

    @property
    def thread_attributes(self) -> tuple[str, ...]:
        """The thread attributes that the function takes."""
        return (GROUP, GROUPS, SIMD, LANE) if self.groups else (GROUP, SIMD, LANE)

    @property
    def body(self) -> str:
        """The text of the kernel between its braces."""
        template = f"<{', '.join(self.arguments)}>" if self.arguments else ""
        memory = f"threadgroup float4 shared_vectors[({self.shared} + 3) / 4];\n" if self.shared else ""
        buffers = [a.name for a in (*self.inputs, *self.outputs)]
        shared = ["reinterpret_cast<threadgroup float*>(shared_vectors)"] if self.shared else []
        passed = [*buffers, *shared, *self.thread_attributes]
        return f"{memory}metalens::{self.function}{template}({', '.join(passed)});\n"

    @property
    def definition(self) -> str:
        """The text of the whole kernel, for a library, with the signature that mx.fast.metal_kernel generates for it."""
        buffers = [f"const device {a.element}* {a.name}" for a in self.inputs] + [f"device {a.element}* {a.name}" for a in self.outputs]
        parameters = [f"  {text} [[buffer({i})]]" for i, text in enumerate(buffers)]
        parameters += [f"  {THREAD_ATTRIBUTES[name]} {name} [[{name}]]" for name in self.thread_attributes]
        return f"[[kernel]] void {self.name}(\n" + ",\n".join(parameters) + f") {{\n{self.body}}}\n"


# The factories of the active emulations, the innermost last. A list, so that every thread sees it.
_emulators: list[Callable[..., Any]] = []


@contextlib.contextmanager
def emulation(factory: Callable[..., Any], device: tuning.Device | None = None) -> Iterator[None]:
    """Run the kernels through `factory`, planned for `device`, inside the `with` block: how the tests run the Metal path without a GPU.

    Args:
        factory: makes a launchable kernel from its source; has the interface of `mx.fast.metal_kernel`.
        device: the GPU that tiles and chunks are planned for; None = the one of this machine.
    """
    _emulators.append(factory)
    try:
        with contextlib.nullcontext() if device is None else tuning.planned_for(device):
            yield
    finally:
        _emulators.pop()


def is_emulated() -> bool:
    """Return whether an `emulation` is active."""
    return bool(_emulators)


@cache
def _just_in_time(kernel: Kernel, make: Callable[..., Any]) -> Callable[..., Any]:
    inputs, outputs = ([a.name for a in arguments] for arguments in (kernel.inputs, kernel.outputs))
    # Masks of -inf and tests for NaN hold in safe mode only, so it is stated, not left to MLX's default.
    text = {"source": kernel.body, "header": inlined(kernel.header), "compile_options": {"math_mode": "safe"}}
    made = make(name=kernel.name, input_names=inputs, output_names=outputs, **text)
    return cast("Callable[..., Any]", made)


def launch(
    kernel: Kernel,
    inputs: Sequence[mx.array],
    groups: tuple[int, int, int],
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[mx.Dtype],
    reuse: Sequence[int] | None = None,
) -> list[mx.array]:
    """Run a kernel and return its outputs. Lazy.

    Args:
        kernel: the descriptor.
        inputs: an array for each input of the descriptor; small ones are padded to eight elements.
        groups: threadgroups in x, y and z.
        shapes, dtypes: shapes and types of the outputs.
        reuse: for each output the index of an input whose memory it may take if nothing else needs that input, or -1. Only kernels compiled ahead of
            time can do that; MLX's just-in-time kernels cannot.
    """
    inputs = [_long_enough(a) for a in inputs]
    threadgroup = (kernel.threads, 1, 1)
    grid = (groups[0] * kernel.threads, groups[1], groups[2])
    if not is_emulated() and (extension := _library_with(kernel.name)) is not None:
        return list(
            extension.launch_metal(kernel.name, inputs, list(map(tuple, shapes)), list(dtypes), grid, threadgroup, list(reuse or [-1] * len(shapes)))
        )
    run = _just_in_time(kernel, _emulators[-1] if _emulators else mx.fast.metal_kernel)
    made = run(inputs=inputs, grid=grid, threadgroup=threadgroup, output_shapes=list(map(tuple, shapes)), output_dtypes=list(dtypes))
    return cast("list[mx.array]", made)


@cache
def absent(dtype: mx.Dtype = mx.float32) -> mx.array:
    """Return an array that takes the position of an input which a problem lacks. Nothing reads it; it is made once, so a call dispatches no fill."""
    return mx.array(np.zeros(FEWEST), dtype)


def _long_enough(a: mx.array) -> mx.array:
    return a if a.size >= FEWEST else mx.concatenate([a.reshape(-1), mx.zeros(FEWEST - a.size, a.dtype)])


def _library_with(name: str) -> Any:
    """Return the extension if its metallib holds this kernel, else None."""
    return _extension.find()[0] if name in _extension.metallib_kernels() else None
