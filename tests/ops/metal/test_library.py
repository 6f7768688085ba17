"""Test the ahead-of-time library: every kernel compiles, and the launcher prefers the library if there is one."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

import mslcpu
from metalens import _extension
from metalens.ops.metal import descriptors, kernel, library, source, tuning
from metalens.ops.metal.formats import format_of
from metalens.ops.metal.matmul import tile_linear
from support import oracle
from support.metal_emulation import M1, needs_clang

UNITS = library.translation_units()
TENSOR_UNITS = library.tensor_units()
TOOL = Path(__file__).parents[3] / "tools" / "metal_library.py"


@needs_clang
@pytest.mark.parametrize("name", UNITS)
def test_every_kernel_of_the_library_compiles(name):
    mslcpu.compile_library(library.text(UNITS[name]), name=f"{name}.metal", include_dirs=[source.folder()])


# The weights whose kernels differ in tensor_tile.h; test_tensor_tile.py runs all formats.
@needs_clang
@pytest.mark.parametrize("name", ["affine_b4_g64_bfloat_tensor", "dense_float_tensor"])
def test_kernels_of_tensor_operations_compile(name):
    mslcpu.compile_library(library.text(TENSOR_UNITS[name]), name=f"{name}.metal", include_dirs=[source.folder()])


def test_the_library_holds_no_tensor_operations():
    """They need macOS 26, and it is for macOS 14."""
    assert not any("tensor" in library.text(kernels) for kernels in UNITS.values())
    assert all("tensor_kernels.h" in library.text(kernels) for kernels in TENSOR_UNITS.values())
    assert {name.removesuffix("_tensor") for name in TENSOR_UNITS} == set(UNITS) - {"shared"}


@needs_clang
def test_what_does_not_compile_is_found():
    text = library.text(UNITS["shared"]).replace("metalens::lens_stats_merge(", "metalens::lens_stats_murge(")
    with pytest.raises(mslcpu.MslError, match=r"shared\.metal:\d+.*lens_stats_murge"):
        mslcpu.compile_library(text, name="shared.metal", include_dirs=[source.folder()])


def test_the_tool_writes_all_of_it_without_the_package(tmp_path):
    # A build environment has mlx but none of the package's other requirements, so mlx_lm must not be imported.
    script = "import sys, runpy; sys.modules['mlx_lm'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    subprocess.run([sys.executable, "-c", script, str(TOOL), "--out", str(tmp_path)], check=True, timeout=120)
    names = json.loads((tmp_path / "kernels.json").read_text())
    assert names == [k.name for kernels in UNITS.values() for k in kernels]
    assert len(set(names)) == len(names) > 600
    assert {path.stem for path in tmp_path.glob("*.metal")} == set(UNITS)
    assert all(f"void {name}(" in (tmp_path / f"{unit}.metal").read_text() for unit, kernels in UNITS.items() for name in (k.name for k in kernels))


def test_names_are_unique_over_everything_that_differs():
    every = [
        make
        for f in map(format_of, [oracle_weight(mode) for mode in ("affine", "dense")])
        for x in (mx.float32, mx.float16, mx.bfloat16)
        for rows in (8, 32)
        for rounded in (False, True)
        for tensor in (False, True)
        for make in (descriptors.lens_stats(x, f, rows, rounded, tensor), descriptors.linear(x, f, rows, rounded, tensor))
    ]
    assert len({k.name for k in every}) == len({k.body for k in every})


def oracle_weight(mode):
    import numpy as np

    rng = np.random.default_rng(0)
    return oracle.random_weight(rng, 8, 64) if mode == "affine" else oracle.Weight(oracle.random_array(rng, 8, 64))


@pytest.fixture
def with_library(monkeypatch):
    """Give a fake extension whose metallib holds the kernel of `product` below; return the list of its launches."""
    launched = []

    def launch_metal(name, inputs, shapes, dtypes, grid, threadgroup, reuse):
        launched.append(SimpleNamespace(name=name, inputs=inputs, grid=grid, threadgroup=threadgroup, reuse=reuse))
        return [mx.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

    monkeypatch.setattr(_extension, "metallib_kernels", lambda: frozenset({"metalens_linear_float_affine_b4_g32_float_m16_float"}))
    monkeypatch.setattr(_extension, "find", lambda: (SimpleNamespace(launch_metal=launch_metal), ""))
    with tuning.planned_for(M1):
        yield launched


def product(rng, rows):
    w = oracle.random_weight(rng, 70, 64)
    return tile_linear(oracle.random_array(rng, rows, 64), w, None, 1.0, rounded=False)


def test_the_library_is_used_where_it_holds_the_kernel(rng, with_library):
    assert product(rng, 5).shape == (5, 70)
    (launch,) = with_library
    assert launch.name == "metalens_linear_float_affine_b4_g32_float_m16_float"
    assert (launch.grid, launch.threadgroup, launch.reuse) == ((128, 2, 1), (128, 1, 1), [-1])
    assert all(a.size >= kernel.FEWEST for a in launch.inputs)


def test_other_kernels_are_compiled_just_in_time(rng, with_library, monkeypatch):
    made = []

    def metal_kernel(name, **kwargs):
        made.append(name)
        return lambda output_shapes, output_dtypes, **_: [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    product(rng, 17)
    product(rng, 20)  # the same kernel: made once
    assert made == ["metalens_linear_float_affine_b4_g32_float_m32_float"]
    assert with_library == []


def test_without_a_metallib_there_are_no_kernels():
    assert _extension.metallib_kernels() == frozenset()
