"""Run the CUDA programs on the CPU, on the fibers of tests/mslcpu. This tests the shim and the translation, which no GPU has run yet."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np

from mslcpu import build
from mslcpu import launch as runtime
from mslcpu.options import Options
from mslcpu.toolchain import clang

from .kernel import Launch

_HEADER = Path(__file__).parent / "cuda_on_cpu.h"
_FLAGS = ["-std=c++20", *build.CODE, "-O1", "-w"]


class CpuExecutor:
    """An executor. It keeps the compiled programs in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, launch: Launch) -> list[np.ndarray]:
        """Run a program and return its outputs. What it does not write is 0xFF."""
        library = self._folder / f"{launch.key}.so"
        if not library.exists():
            pointers = [f"(decltype(moc_type<{i}>({launch.name})))c->buffers[{i}]" for i in range(len(launch.inputs) + len(launch.shapes))]
            entry = f'extern "C" void msl_entry(const cpu::Context* c) {{ {launch.name}({", ".join(pointers)}); }}\n'
            path = library.with_suffix(".cpp")
            path.write_text(f'#include "{_HEADER}"\n{launch.text}\n{_TYPE_OF_PARAMETER}{entry}', encoding="utf-8")
            done = subprocess.run([clang(), *_FLAGS, str(path), "-lstdc++", "-lm", "-o", str(library)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[:4000])
        arguments = [runtime.input_argument(str(i), array, checked=False) for i, array in enumerate(launch.inputs)]
        results = []
        for shape, dtype in zip(launch.shapes, launch.dtypes, strict=True):
            argument, array = runtime.output_argument("out", shape, dtype, None, checked=False)
            arguments.append(argument)
            results.append(array)
        grid = [g * t for g, t in zip(launch.groups, launch.threads, strict=True)]
        runtime.run(library, launch.name, arguments, grid, launch.threads, Options(checked=False))
        return results


# The type of a function's i-th parameter.
_TYPE_OF_PARAMETER = """
template <int i, class First, class... Rest>
auto moc_type_at() {
  if constexpr (i == 0) return (First) nullptr;
  else return moc_type_at<i - 1, Rest...>();
}
template <int i, class... Parameters>
auto moc_type(void (*)(Parameters...)) {
  return moc_type_at<i, Parameters...>();
}
"""
