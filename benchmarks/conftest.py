"""Define the settings and fixtures of the suites, and describe the machine for the report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # `pytest` does not put it there, `python -m pytest` does

from benchmarks.peaks import Peaks, UnavailableError, cores
from benchmarks.suite import Suite

from metalens import _extension

PACKAGES = ("metalens", "mlx", "mlx-lm", "numpy", "torch")
INSTRUCTION_SETS = ("fma", "avx2", "avx512f", "avx512vl", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def quick_mode() -> bool:
    """Return whether METALENS_BENCH_QUICK=1 asks for the small shapes only, for a shorter time."""
    return os.environ.get("METALENS_BENCH_QUICK", "") not in ("", "0")


@pytest.fixture(scope="session")
def peaks() -> Peaks:
    try:
        return Peaks()
    except UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.fixture
def suite(benchmark: Any, peaks: Peaks) -> Suite:
    return Suite(benchmark, peaks, quick_mode())


@pytest.fixture
def full_only() -> None:
    """Skip the test in quick mode."""
    if quick_mode():
        pytest.skip("Quick mode runs the small shapes only.")


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Add instruction sets, cores and versions to pytest-benchmark's record of the machine; a hook of pytest-benchmark."""
    extension, reason = _extension.find()
    flags = set(machine_info.get("cpu", {}).get("flags", []))
    machine_info["metalens"] = {
        "quick": quick_mode(),
        "cores": cores(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "kernels": extension.isa() if extension is not None else reason,
        "kernels_available": extension.available_isas().split() if extension is not None else [],
        "versions": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
        "load_before": round(os.getloadavg()[0], 2),
    }
    try:
        peaks = Peaks()
    except UnavailableError:
        return
    machine_info["metalens"]["peaks"] = {name: peaks.burst(name, 0.2) for name in peaks.available}
    machine_info["metalens"]["vector_bits"] = peaks.vector_bits
