"""A counterpart of mx.fast.metal_kernel whose launches go to an executor: one that runs them on an NVIDIA GPU, or one that only notes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from .translation import translated

_METAL = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat", mx.int32: "int", mx.uint32: "uint", mx.uint8: "uchar", mx.bool_: "bool"}
_NUMPY = {
    mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16, mx.int32: np.int32, mx.uint32: np.uint32, mx.uint8: np.uint8,
    mx.bool_: np.bool_,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch of a kernel.

    Attributes:
        name: of the kernel.
        text: the CUDA program.
        inputs: its input buffers; bfloat16 as uint16.
        shapes, dtypes: of its output buffers.
        groups, threads: of the grid and of a threadgroup, in x, y and z.
    """

    name: str
    text: str
    inputs: tuple[np.ndarray, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    groups: tuple[int, int, int]
    threads: tuple[int, int, int]

    @cached_property
    def key(self) -> str:
        """A name that tells programs apart."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]

    @property
    def threads_of_group(self) -> int:
        """The number of threads of a threadgroup."""
        return int(np.prod(self.threads))


Executor = Callable[[Launch], "list[np.ndarray]"]


def to_numpy(array: mx.array) -> np.ndarray:
    """Return an array's values; bfloat16 as uint16."""
    whole = mx.contiguous(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    mx.eval(whole)
    return np.asarray(whole)


def to_mx(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    """Undo `to_numpy`."""
    return mx.array(array).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(array)


def factory(executor: Executor) -> Callable[..., Any]:
    """Return the counterpart of mx.fast.metal_kernel, for metalens.ops.metal.kernel.emulation."""

    def metal_kernel(
        name: str, input_names: Sequence[str], output_names: Sequence[str], source: str, header: str = "", **_: Any
    ) -> Callable[..., Any]:
        def call(
            *,
            inputs: Sequence[mx.array],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
            **_: Any,
        ) -> list[mx.array]:
            given = [(n, _METAL[a.dtype]) for n, a in zip(input_names, inputs, strict=True)]
            made = [(n, _METAL[t]) for n, t in zip(output_names, output_dtypes, strict=True)]
            launch = Launch(
                name=name,
                text=translated(name, given, made, source, header),
                inputs=tuple(map(to_numpy, inputs)),
                shapes=tuple(tuple(shape) for shape in output_shapes),
                dtypes=tuple(np.dtype(_NUMPY[t]) for t in output_dtypes),
                groups=tuple(-(-g // t) for g, t in zip(grid, threadgroup, strict=True)),
                threads=threadgroup,
            )
            return [to_mx(a, t) for a, t in zip(executor(launch), output_dtypes, strict=True)]

        return call

    return metal_kernel


class Recorder:
    """An executor that notes every program and returns zeros.

    Attributes:
        launches: the first launch of each program.
    """

    def __init__(self) -> None:
        self.launches: dict[str, Launch] = {}

    def __call__(self, launch: Launch) -> list[np.ndarray]:
        self.launches.setdefault(launch.key, launch)
        return [np.zeros(shape, dtype) for shape, dtype in zip(launch.shapes, launch.dtypes, strict=True)]
