"""The counterpart of mx.fast.metal_kernel."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from . import build, launch
from .errors import MslError
from .options import Report, Traffic, current, record
from .signature import Input, call_arguments, shape_arguments, template_text, write_signature

_NUMPY = {
    mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16, mx.complex64: np.complex64, mx.bool_: np.bool_,
    mx.int8: np.int8, mx.int16: np.int16, mx.int32: np.int32, mx.int64: np.int64,
    mx.uint8: np.uint8, mx.uint16: np.uint16, mx.uint32: np.uint32, mx.uint64: np.uint64,
}  # fmt: skip
MLX_PREAMBLE = "mlx/backend/metal/kernels/utils.h"
_MX = {np.dtype(n): m for m, n in _NUMPY.items() if m != mx.bfloat16}


def _to_numpy(value: Any) -> tuple[np.ndarray, mx.Dtype]:
    """Return an input as a NumPy array, without a copy if possible; bfloat16 as uint16."""
    if isinstance(value, np.ndarray) and value.dtype in _MX:
        return value, _MX[value.dtype]
    array = value if isinstance(value, mx.array) else mx.array(value)
    dtype = array.dtype
    if dtype == mx.bfloat16:
        array = array.view(mx.uint16) if array.ndim else array.reshape(1).view(mx.uint16).reshape(())
    mx.eval(array)
    return np.asarray(array), dtype


def _to_mx(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    result = mx.array(array)
    if dtype != mx.bfloat16:
        return result
    return result.view(mx.bfloat16) if array.ndim else result.reshape(1).view(mx.bfloat16).reshape(())


def _expect(what: str, given: Sequence[Any], names: Sequence[str]) -> None:
    if len(given) != len(names):
        raise ValueError(f"[metal_kernel] Expected `{what}` to have size {len(names)} but got size {len(given)}.")


def _shape_argument(kind: str, array: np.ndarray) -> np.ndarray:
    if kind == "shape":
        return np.array(array.shape, np.int32)
    if kind == "strides":
        return np.array([s // array.itemsize for s in array.strides], np.int64)
    return np.array([array.ndim], np.int32)


class MetalKernel:
    """A kernel, called like the result of mx.fast.metal_kernel."""

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        compile_options: Any = None,
    ):
        if not output_names:
            raise ValueError("[metal_kernel] Must specify at least one output.")
        self.name = name
        self.input_names, self.output_names = list(input_names), list(output_names)
        self.source, self.header = source, header
        self.ensure_row_contiguous, self.atomic_outputs = ensure_row_contiguous, atomic_outputs
        mode = (compile_options or {}).get("math_mode", "safe")
        if mode != "safe":
            raise ValueError(f"[metal_kernel] mslcpu computes as math_mode 'safe' does, not {mode!r}.")

    def signature(
        self, inputs: Sequence[Input], output_dtypes: Sequence[mx.Dtype], template: Sequence[tuple[str, Any]], restrict: bool = False
    ) -> str:
        outputs = list(zip(self.output_names, output_dtypes, strict=True))
        return write_signature(self._function(template), self.source, inputs, outputs, template, self.atomic_outputs, restrict)

    def _function(self, template: Sequence[tuple[str, Any]]) -> str:
        values = "".join(f"_{template_text(value)}" for _, value in template)
        return re.sub(r"\W", "_", f"custom_kernel_{self.name}{values}")

    def _build(self, signature: str, buffers: int, template: Sequence[tuple[str, Any]], checked: bool) -> pathlib.Path:
        text = (
            f'#include <metal_stdlib>\n#line 1 "{self.name}.header"\n{self.header}\n#line 1 "{self.name}.signature"\n{signature}'
            f'#line 1 "{self.name}.source"\n{self.source}\n}}\n'
        )
        call = self._function(template)
        if template:
            call += f"<{', '.join(template_text(value) for _, value in template)}>"
        return build.build_kernel(text, call, call_arguments(buffers, self.source), checked)

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
        build_only: bool = False,
        in_place: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """Run the kernel. `grid` counts threads.

        Beyond the arguments of MLX's kernels, `build_only` only compiles it, and `in_place` = {output: input} gives an output the memory of an input,
        as a launcher does with a donated input. The caller's own array stays as it is.
        """
        _expect("inputs", inputs, self.input_names)
        _expect("output_shapes", output_shapes, self.output_names)
        _expect("output_dtypes", output_dtypes, self.output_names)
        options, template = current(), list(template or ())
        arguments: list[launch.Argument] = []
        described = []
        for name, value in zip(self.input_names, inputs, strict=True):
            array, dtype = _to_numpy(value)
            if self.ensure_row_contiguous and not array.flags.c_contiguous:
                array = np.ascontiguousarray(array)
            described.append(Input(name, dtype, array.size, array.ndim))
            arguments.append(launch.input_argument(name, array, options.checked))
            for kind in shape_arguments(name, self.source) if array.ndim else ():
                arguments.append(launch.input_argument(f"{name}_{kind}", _shape_argument(kind, array), options.checked))
        # With aliases, the compiler gets the license that Apple's has: buffers of a kernel are assumed not to overlap.
        signature = self.signature(described, output_dtypes, template, restrict=bool(in_place))
        if verbose:
            sys.stdout.write(f"Generated source code for `{self.name}`:\n```\n{self.header}{signature}{self.source}\n}}\n```\n")
        library = self._build(signature, len(arguments) + len(self.output_names), template, options.checked)
        if build_only:
            return []
        results = []
        for name, shape, dtype in zip(self.output_names, output_shapes, output_dtypes, strict=True):
            init = init_value
            if init is not None and dtype == mx.bfloat16:
                init = np.asarray(mx.array([init], mx.bfloat16).view(mx.uint16))[0]
            if (donor := (in_place or {}).get(name)) is not None:
                given = arguments[[a.name for a in arguments].index(donor)]
                argument, array = launch.output_over_input(name, given, tuple(shape), np.dtype(_NUMPY[dtype]))
            else:
                argument, array = launch.output_argument(name, tuple(shape), np.dtype(_NUMPY[dtype]), init, options.checked)
            arguments.append(argument)
            results.append(array)
        clamped = tuple(min(t, g) for t, g in zip(threadgroup, grid, strict=True))  # MLX does the same
        start = time.perf_counter()
        done, buffers = launch.run(library, self.name, arguments, grid, clamped, options)
        record(_report(self.name, done, buffers, arguments, time.perf_counter() - start))
        if options.numpy_outputs:
            return results
        return [_to_mx(array, dtype) for array, dtype in zip(results, output_dtypes, strict=True)]


def _report(name: str, done: Any, buffers: Any, arguments: Sequence[launch.Argument], seconds: float) -> Report:
    traffic = {
        a.name: Traffic(b.read, b.written, b.unique_read, b.unique_written, launch.accesses_of(b.loads), launch.accesses_of(b.stores))
        for a, b in zip(arguments, buffers, strict=False)
    }
    return Report(
        name=name, grid=tuple(done.grid), threadgroup=tuple(done.threadgroup), buffers=traffic, threadgroup_bytes=done.threadgroup_bytes,
        threadgroup_read=done.threadgroup_read, threadgroup_written=done.threadgroup_written,
        threadgroup_loads=launch.accesses_of(done.threadgroup_loads), threadgroup_stores=launch.accesses_of(done.threadgroup_stores),
        matrix_ops=done.matrix_ops,
        barriers=done.barriers, simd_ops=done.simd_ops, atomics=done.atomics, threads=done.threads, threadgroups=done.threadgroups,
        seconds=seconds,
    )  # fmt: skip


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: Any = None,
) -> MetalKernel:
    """Make a kernel that runs on the CPU, from the arguments of mx.fast.metal_kernel."""
    return MetalKernel(name, input_names, output_names, source, header, ensure_row_contiguous, atomic_outputs, compile_options)


def compile_library(source: str, name: str = "library.metal", include_dirs: Iterable[str] = (), with_mlx: bool = False) -> None:
    """Lint and compile a complete .metal file without running it. Raises MslError with the file's own lines.

    `with_mlx`: compile it behind the preamble that MLX puts before a custom kernel, from the headers of the installed mlx.
    """
    directories = [*include_dirs, *([os.path.join(os.path.dirname(mx.__file__), "include")] if with_mlx else [])]
    text = f'#include "{MLX_PREAMBLE}"\n#line 1 "{name}"\n{source}' if with_mlx else source
    build.check_syntax(build.translate(build.preprocess(text, name, directories), with_mlx))


def prebuild(jobs: Iterable[Callable[[], object]], workers: int = 2) -> None:
    """Run calls such as ``lambda: kernel(..., build_only=True)`` in parallel, to fill the cache. Raises the first error at the end."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


__all__ = ["MetalKernel", "MslError", "compile_library", "metal_kernel", "prebuild"]
