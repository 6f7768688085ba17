"""What doctor says of an installation, also of one that is broken."""

import json

import mlx.core as mx
import pytest

from metalens import _extension
from metalens.ops import doctor
from metalens.ops.metal import tuning


def test_a_working_installation():
    found = doctor.examine()
    assert found.problems == []
    assert found.native_problem == ""
    assert found.native.instruction_set in found.native.available_instruction_sets
    assert found.native.largest_difference < doctor.TOLERANCE
    assert found.native.threads >= 1
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_without_an_extension(monkeypatch):
    monkeypatch.setattr(_extension, "find", lambda: (None, "it was not built"))
    found = doctor.examine()
    assert found.native is None
    assert found.native_problem == "it was not built"
    assert found.problems == ["The native extension is not used, because it was not built. Reinstall metalens to build it."]


@pytest.mark.parametrize("difference", [1e-3, float("nan")])
def test_kernels_that_compute_something_else(monkeypatch, difference):
    monkeypatch.setattr(doctor, "_compare", lambda: (difference, 10.0))
    (problem,) = doctor.examine().problems
    assert "METALENS_BACKEND=reference" in problem


@pytest.mark.parametrize(
    ("device", "tf32", "units", "products"),
    [
        (tuning.Device("applegpu_g14s", 2**34, 38), "1", "none: they begin with generation 17", "float32"),
        (tuning.Device("applegpu_g17s", 2**34), "1", "not used: MLX needs macOS 26.2", "float32"),
        (tuning.Device("applegpu_g17s", 2**34, 20, True), "1", "used by plain MLX", "rounded to 11 bits (TF32). Set MLX_ENABLE_TF32=0"),
        (tuning.Device("applegpu_g17s", 2**34, 20, True), "0", "used by plain MLX", "float32"),
        (tuning.Device("applegpu_g17s", 2**34, 20, True, True), "0", "and by the kernels' tiles of tensor operations", "float32"),
    ],
)
def test_a_gpu(monkeypatch, device, tf32, units, products):
    monkeypatch.setenv("MLX_ENABLE_TF32", tf32)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    with tuning.planned_for(device):
        found = doctor.examine().metal
    assert units in found.matrix_units
    assert products in found.float32_products
    assert (found.cores, found.cores_counted) == (device.cores, device.counted_cores > 0)
