"""Compile the unchanged Metal kernels with CUDA's compiler, and run the matrix of cells on an NVIDIA GPU. README.md says what this shows.

    python tests/metal_on_cuda/run_on_gpu.py --compile-only     no GPU needed: every kernel that the cells launch; registers and code of some
    python tests/metal_on_cuda/run_on_gpu.py                    every cell on the GPU, compared with float64
    python tests/metal_on_cuda/run_on_gpu.py --sanitizer        the same under compute-sanitizer: memcheck, racecheck, synccheck

Exit status: 0 if all is well, 1 if a kernel or a cell fails, 2 if the compiler, the GPU or the sanitizer is missing.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from metal_on_cuda import gpu as cuda  # noqa: E402
from metal_on_cuda import nvrtc  # noqa: E402
from metal_on_cuda.kernel import Launch, Recorder, factory  # noqa: E402
from metal_on_cuda.translation import translated  # noqa: E402
from metalens import use_backend  # noqa: E402
from metalens.ops.metal import kernel as metal_kernel  # noqa: E402
from metalens.ops.metal import library, source, tuning  # noqa: E402
from metalens.ops.metal.formats import all_formats  # noqa: E402
from support import metal_cells, metal_emulation  # noqa: E402

FAILED, MISSING = 1, 2
DEVICES = {"M1": metal_emulation.M1, "M3": metal_emulation.M3}  # what the kernels are planned for
# Tools of compute-sanitizer and their options. racecheck does not report hazards below its threshold, and its exit status ignores warnings.
TOOLS = {"memcheck": (), "racecheck": ("--racecheck-report", "all"), "synccheck": ()}
MEASURED = "affine_b4_g64_bfloat"  # the weight whose kernels become machine code and are measured, in all block sizes of the ahead-of-time library
MOST_SPILLED = 0  # bytes that a thread stores and loads because it has too few registers
MOST_INSTRUCTIONS = 6000


def cells(pattern: str) -> list[metal_cells.Cell]:
    """Return the cells whose name matches."""
    return [cell for cell in metal_cells.cells() if re.search(pattern, str(cell))]


def launched(chosen: Sequence[metal_cells.Cell], device: tuning.Device) -> dict[str, Launch]:
    """Return the programs that the cells launch, without running any."""
    recorder = Recorder()
    with metal_kernel.emulation(factory(recorder), device), use_backend("metal"):
        for cell in chosen:
            metal_cells.launch(cell)  # and compare nothing: the recorder's results are zeros
    return recorder.launches


def measured() -> dict[str, Launch]:
    """Return the library's kernels without a weight and of the weight MEASURED, as launches without buffers."""
    (weight,) = (f for f in all_formats() if f.label == MEASURED)
    found = [as_launch(kernel) for kernel in (*library.of_no_format(), *library.of_format(weight))]
    return {launch.key: launch for launch in found}


def as_launch(kernel: metal_kernel.Kernel) -> Launch:
    """Return a launch of the kernel that can only be compiled."""
    buffers = [[(a.name, a.element) for a in arguments] for arguments in (kernel.inputs, kernel.outputs)]
    text = translated(kernel.name, *buffers, kernel.body, source.inlined(kernel.header))
    return Launch(kernel.name, text, (), (), (), (1, 1, 1), (kernel.threads, 1, 1))


def compiled(
    launches: dict[str, Launch], architecture: str, to_machine_code: Collection[str]
) -> Iterator[tuple[Launch, nvrtc.Compiled | nvrtc.CompilationError]]:
    """Compile the programs on all processors: those in `to_machine_code` for `architecture`, the others to PTX."""

    def one(launch: Launch) -> nvrtc.Compiled | nvrtc.CompilationError:
        try:
            return nvrtc.compiled(launch.text, launch.name, launch.threads_of_group, architecture if launch.key in to_machine_code else nvrtc.PTX)
        except nvrtc.CompilationError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from zip(launches.values(), pool.map(one, launches.values()), strict=True)


def compile_all(chosen: Sequence[metal_cells.Cell], device: tuning.Device) -> int:
    """Compile every kernel that the cells launch and those that are measured, print a summary, and return the exit status."""
    if reason := nvrtc.unavailable():
        print(f"metal_on_cuda: 0 kernels compiled: {reason}")
        return MISSING
    failed = total = 0
    by_function: dict[str, list[nvrtc.Compiled]] = collections.defaultdict(list)
    of_library = measured()
    for launch, result in compiled(launched(chosen, device) | of_library, nvrtc.ARCHITECTURE, of_library):
        if isinstance(result, nvrtc.CompilationError):
            failed += 1
            print(str(result)[:2000])
            continue
        total += 1
        if result.registers is not None:
            by_function[re.sub(r"_(float|half|bfloat)(_.*)?$", "", launch.name.removeprefix("metalens_"))].append(result)
    print(f"{'largest of':20}{'kernels':>9}{'registers':>11}{'spilled':>9}{'stack':>7}{'instructions':>14}")
    for function, results in by_function.items():
        registers, spilled, stack, instructions = (
            max(getattr(r, name) for r in results) for name in ("registers", "spilled", "stack", "instructions")
        )
        print(f"{function:20}{len(results):>9}{registers:>11}{spilled:>9}{stack:>7}{instructions:>14}")
        if spilled > MOST_SPILLED or instructions > MOST_INSTRUCTIONS:
            failed += 1
            print(f"  {function} exceeds {MOST_SPILLED} spilled bytes ({nvrtc.MOST_REGISTERS} registers) or {MOST_INSTRUCTIONS} instructions")
    print(f"metal_on_cuda: {total} kernels compiled by NVRTC {nvrtc.version()} for {nvrtc.ARCHITECTURE}, {failed} failures")
    return FAILED if failed or not total else 0


def images(chosen: Sequence[metal_cells.Cell], device: tuning.Device, architecture: str, cache: Path) -> dict[str, bytes]:
    """Return {program: machine code}. The folder `cache` keeps it, since every run under the sanitizer is a process of its own."""
    cache.mkdir(parents=True, exist_ok=True)
    launches = launched(chosen, device)
    paths = {key: cache / f"{key}-{architecture}-{nvrtc.version()}.cubin" for key in launches}
    for launch, result in compiled({key: launches[key] for key, path in paths.items() if not path.exists()}, architecture, launches):
        if isinstance(result, nvrtc.CompilationError):
            raise result
        partial = paths[launch.key].with_suffix(f".{os.getpid()}")
        partial.write_bytes(result.image)
        partial.replace(paths[launch.key])
    return {key: path.read_bytes() for key, path in paths.items()}


def run_all(chosen: Sequence[metal_cells.Cell], device: tuning.Device, cache: Path) -> int:
    """Run the cells on the GPU, print those that fail, and return the exit status."""
    library = cuda.driver()
    if reason := nvrtc.unavailable() or (None if library else "there is no NVIDIA driver (libcuda.so.1) here"):
        print(f"metal_on_cuda: 0 cells run: {reason}")
        return MISSING
    gpu = cuda.Gpu(library)
    code = images(chosen, device, gpu.architecture, cache)
    failed = 0
    with metal_kernel.emulation(factory(lambda launch: gpu.run(launch, code[launch.key])), device), use_backend("metal"):
        for cell in chosen:
            try:
                errors = metal_cells.run(cell)
                problem = "" if errors.good else f"off by {errors.ours:.2e}, plain MLX by {errors.plain:.2e}"
            except AssertionError as error:
                problem = str(error).strip()
            if problem:
                failed += 1
                print(f"{cell}: {problem}")
    print(f"metal_on_cuda: {len(chosen) - failed} of {len(chosen)} cells agree with float64 on {gpu.name} ({gpu.architecture})")
    return FAILED if failed or not chosen else 0


def sanitize(arguments: Sequence[str]) -> int:
    """Run the cells under each tool of compute-sanitizer and return the exit status."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        print("metal_on_cuda: compute-sanitizer was not found; it is part of the CUDA toolkit")
        return MISSING
    codes = []
    for tool, options in TOOLS.items():
        print(f"{tool}:", flush=True)
        command = [sanitizer, "--tool", tool, *options, "--error-exitcode", str(FAILED), "--print-limit", "20", sys.executable, __file__, *arguments]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, end="", flush=True)
        hazards = any("hazard" in line and " 0 hazards " not in line for line in done.stdout.splitlines())
        codes.append(FAILED if hazards else done.returncode)
    return MISSING if MISSING in codes else FAILED if any(codes) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments say and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--compile-only", action="store_true", help="compile the kernels; needs no GPU")
    mode.add_argument("--sanitizer", action="store_true", help="run the cells under compute-sanitizer")
    parser.add_argument("--cells", default="", metavar="REGEX", help="only the cells whose name matches (default: all)")
    parser.add_argument("--device", default="M1", choices=DEVICES, help="the Apple GPU that the kernels are planned for (default: M1)")
    parser.add_argument("--cache", type=Path, default=TESTS.parent / "build" / "metal_on_cuda", help="folder for compiled kernels")
    args = parser.parse_args(argv)
    mx.set_default_device(mx.cpu)
    if args.sanitizer:
        return sanitize(["--cells", args.cells, "--device", args.device, "--cache", str(args.cache)])
    chosen, device = cells(args.cells), DEVICES[args.device]
    return compile_all(chosen, device) if args.compile_only else run_all(chosen, device, args.cache)


if __name__ == "__main__":
    sys.exit(main())
