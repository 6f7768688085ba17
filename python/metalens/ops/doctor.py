"""What runs here and why not more: versions, backends, kernels, and a check that the kernels compute what plain MLX does."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from metalens import _extension
from metalens.ops import Weight, backend, linear, precision, use_backend
from metalens.ops.metal import tuning
from metalens.utils.arrays import to_float


def examine() -> dict[str, Any]:
    """Facts by name; 'problems' lists, in sentences, what stands in the way of full speed."""
    extension, reason = _extension.find()
    facts: dict[str, Any] = {
        "metalens": importlib.metadata.version("metalens"),
        "mlx": importlib.metadata.version("mlx"),
        "mlx-lm": importlib.metadata.version("mlx-lm"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(mx.default_device()),
        **_metal_facts(),
        "backend asked for": backend(),
        "native extension": "loaded" if extension is not None else f"not used: {reason}",
    }
    problems: list[str] = []
    if extension is None:
        problems.append(f"The native extension is not used, because {reason}. Reinstall metalens to build it.")
    else:
        facts["instruction set"] = extension.isa()
        facts["instruction sets available"] = extension.available_isas().split()
        facts["precision asked for"] = precision()
        facts["16-bit operands"] = "multiplied faster" if extension.multiplies_bf16() else "computed as float32: the instruction set has none"
        facts["threads"] = extension.num_threads()
        error, speedup = _compare()
        facts["native against plain MLX, largest difference"] = f"{error:.1e}"
        facts["native against plain MLX, speed on the CPU"] = f"{speedup:.0f}x (64 x 512 by 512 x 512, 4-bit)"
        if not error < 1e-4:
            problems.append(f"The native kernels differ from plain MLX by {error:.1e}. Set METALENS_BACKEND=reference and report this.")
    facts["problems"] = problems
    return facts


def _metal_facts() -> dict[str, str]:
    """What there is of a GPU, and where its kernels come from."""
    if not mx.metal.is_available():
        return {"metal": "not available here"}
    gpu, kernels = tuning.device(), _extension.metallib_kernels()
    return {
        "metal": f"available: {gpu.architecture}, tuned as generation {gpu.generation.number}",
        "metal kernels": f"{len(kernels)} compiled ahead of time, others just in time" if kernels else "compiled just in time: there is no metallib",
    }


def _compare() -> tuple[float, float]:
    """(largest difference, time ratio) of the native and the plain quantized product on the CPU."""
    with mx.stream(mx.cpu):
        x = mx.random.normal((64, 512), key=mx.random.key(0))
        values, scales, biases = mx.quantize(mx.random.normal((512, 512), key=mx.random.key(1)) / 23, 64, 4)
        weight = Weight(values, scales, biases, 64, 4)

        def product() -> mx.array:
            return linear(x, weight)

        with use_backend("reference"):
            plain, slow = _timed(product)
        with use_backend("native"):
            ours, fast = _timed(product)
        return to_float(mx.max(mx.abs(plain - ours))), slow / fast


def _timed(run: Callable[[], mx.array], repeats: int = 5) -> tuple[mx.array, float]:
    result, times = run(), []
    mx.eval(result)
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - start)
    return result, statistics.median(times)
