"""Check an installation: versions, backends and kernels, and whether the native kernels compute what plain MLX does."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from metalens import _extension
from metalens.ops import Weight, backend, linear, precision, use_backend
from metalens.ops.metal import matrix_units, tuning
from metalens.utils.arrays import to_float

TOLERANCE = 1e-4  # largest difference between the native kernels and plain MLX


@dataclass(frozen=True)
class MetalDiagnosis:
    """What is known of the GPU.

    Attributes:
        architecture: name of the GPU's architecture in MLX.
        generation: generation that kernels are tuned for.
        cores: number of cores that kernels are planned for.
        cores_counted: whether the system counts so many. False = that many are the most that a GPU of this name has.
        compiled_kernels: number of kernels that were compiled ahead of time. 0 = there is no metallib, all are compiled just in time.
        matrix_units: whether the GPU has matrix units that MLX uses, in words.
        float32_products: how exactly plain MLX multiplies float32, in words. metalens's own float32 products are exact to float32.
    """

    architecture: str
    generation: int
    cores: int
    cores_counted: bool
    compiled_kernels: int
    matrix_units: str
    float32_products: str


@dataclass(frozen=True)
class NativeDiagnosis:
    """What is known of the native CPU kernels.

    Attributes:
        instruction_set: instruction set in use.
        available_instruction_sets: instruction sets that this processor can run.
        fast_bfloat16: whether the instruction set multiplies 16-bit operands faster. False = they are computed as float32.
        threads: number of threads.
        product: the product that was compared with plain MLX.
        largest_difference: largest difference of an element of this product from plain MLX.
        speedup: time of plain MLX on the CPU, divided by that of the native kernels.
    """

    instruction_set: str
    available_instruction_sets: list[str]
    fast_bfloat16: bool
    threads: int
    product: str
    largest_difference: float
    speedup: float


@dataclass(frozen=True)
class Diagnosis:
    """What an installation can do.

    Attributes:
        metalens, mlx, mlx_lm, python: versions.
        platform: operating system and processor.
        device: MLX's default device.
        backend: backend that was asked for.
        precision: precision that was asked for.
        metal: the GPU. None = Metal is not available.
        native: the native extension. None = it is not used.
        native_problem: why the native extension is not used. "" = it is used.
        problems: sentences about everything that prevents full speed or right results. Empty if all is well.
    """

    metalens: str
    mlx: str
    mlx_lm: str
    python: str
    platform: str
    device: str
    backend: str
    precision: str
    metal: MetalDiagnosis | None
    native: NativeDiagnosis | None
    native_problem: str
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as JSON."""
        return asdict(self)


def examine() -> Diagnosis:
    """Examine this installation. Runs a few small products."""
    extension, reason = _extension.find()
    native = None if extension is None else _native_diagnosis(extension)
    return Diagnosis(
        metalens=importlib.metadata.version("metalens"),
        mlx=importlib.metadata.version("mlx"),
        mlx_lm=importlib.metadata.version("mlx-lm"),
        python=platform.python_version(),
        platform=platform.platform(),
        device=str(mx.default_device()),
        backend=backend(),
        precision=precision(),
        metal=_metal_diagnosis(),
        native=native,
        native_problem=reason,
        problems=_problems(native, reason),
    )


def _problems(native: NativeDiagnosis | None, reason: str) -> list[str]:
    if native is None:
        return [f"The native extension is not used, because {reason}. Reinstall metalens to build it."]
    if not native.largest_difference < TOLERANCE:  # also true of NaN
        return [f"The native kernels differ from plain MLX by {native.largest_difference:.1e}. Set METALENS_BACKEND=reference and report this."]
    return []


def _metal_diagnosis() -> MetalDiagnosis | None:
    if not mx.metal.is_available():
        return None
    gpu = tuning.device()
    return MetalDiagnosis(
        architecture=gpu.architecture,
        generation=gpu.generation.number,
        cores=gpu.cores,
        cores_counted=gpu.counted_cores > 0,
        compiled_kernels=len(_extension.metallib_kernels()),
        matrix_units=_matrix_units(gpu),
        float32_products=_float32_products(),
    )


def _matrix_units(gpu: tuning.Device) -> str:
    if gpu.matrix_units:
        tiles = ", and by the kernels' tiles of tensor operations (METALENS_METAL_TILES)" if gpu.tensor_tiles else ""
        return f"used by plain MLX, and by metalens with precision 'bfloat16'{tiles}"
    if gpu.generation.number < tuning.MATRIX_UNIT_GENERATION:
        return f"none: they begin with generation {tuning.MATRIX_UNIT_GENERATION} (M5)"
    return f"not used: MLX needs macOS {'.'.join(map(str, tuning.MATRIX_UNIT_MACOS))}"


def _float32_products() -> str:
    if matrix_units.round_float32():
        return "operands rounded to 11 bits (TF32). Set MLX_ENABLE_TF32=0 before Python starts to keep float32"
    return "float32"


def _native_diagnosis(extension: Any) -> NativeDiagnosis:
    difference, speedup = _compare()
    return NativeDiagnosis(
        instruction_set=extension.isa(),
        available_instruction_sets=extension.available_isas().split(),
        fast_bfloat16=extension.multiplies_bf16(),
        threads=extension.num_threads(),
        product="64 x 512 by 512 x 512, 4-bit",
        largest_difference=difference,
        speedup=speedup,
    )


def _compare() -> tuple[float, float]:
    """Compare the native quantized product with plain MLX's on the CPU. Return the largest difference and the ratio of times."""
    with mx.stream(mx.cpu):
        x = mx.random.normal((64, 512), key=mx.random.key(0))
        values, scales, biases = mx.quantize(mx.random.normal((512, 512), key=mx.random.key(1)) / 23, 64, 4)
        weight = Weight(values, scales, biases, 64, 4)

        def product() -> mx.array:
            return linear(x, weight)

        with use_backend("reference"):
            plain, plain_seconds = _timed(product)
        with use_backend("native"):
            native, native_seconds = _timed(product)
        return to_float(mx.max(mx.abs(plain - native))), plain_seconds / native_seconds


def _timed(run: Callable[[], mx.array], repeats: int = 5) -> tuple[mx.array, float]:
    """Return the result of a computation, and the median seconds of its repetitions."""
    result, times = run(), []
    mx.eval(result)
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - start)
    return result, statistics.median(times)
