"""Run every cell of the matrix in emulation with all checks: races, bounds, divergence, uninitialized memory, limits; values against float64."""

import re
from dataclasses import astuple

import pytest

import mslcpu
from support import metal_cells as cells
from support.metal_emulation import emulated, needs_clang

pytestmark = needs_clang


# The kernels that must have run for a cell: the beginnings of their names, as regular expressions.
KERNELS = {
    "lens_stats": (r"lens_stats_(float|half|bfloat)_", "lens_label_logits_", "lens_stats_merge"),
    "lens_stats_vector": ("lens_stats_vector_", "lens_label_logits_vector_", "lens_stats_merge"),
    "lens_compare": ("linear_", "lens_compare"),
    "linear": ("linear_",),
    "lens_kl": ("linear_", "lens_softmax_grad_", "lens_backward_"),
    "translate_norm_rms": ("linear_", "norm_grad"),
    "translate_norm_layer": ("linear_", "norm_grad"),
}


def runs() -> list:
    """Return (cell, inexact) of every cell, and again of one weight of each kind: formats share what follows after their numbers are unpacked."""
    chosen = re.compile(rf"{cells.WITH_OFFSET}-|^translate_norm|-(dense|affine4g64|mxfp4|mxfp8|nvfp4)-")
    exact = [pytest.param(cell, False, id=f"{cell}-exact") for cell in cells.cells()]
    return exact + [pytest.param(cell, True, id=f"{cell}-inexact") for cell in cells.cells() if chosen.search(str(cell))]


@pytest.mark.parametrize(("cell", "inexact"), runs())
def test_cell(cell, inexact, record_property):
    """`inexact`: the tolerance must hold too if exp, log and tanh err by 4 units in the last place and subnormal numbers are flushed."""
    with emulated(), mslcpu.options(inexact=inexact, schedule="random" if inexact else "forward"), mslcpu.recording() as reports:
        errors = cells.run(cell)
    ran = {report.name for report in reports}
    wanted = KERNELS[cell.kernel.removesuffix(cells.WITH_OFFSET)]
    of_one_row = cell.shape == "one" and cell.mode != "dense" and cell.kernel != "linear"
    if (cell.dtype == "float32" and cell.mode == "dense") or of_one_row:  # MLX's
        wanted = tuple(kernel for kernel in wanted if kernel != "linear_")
        assert not any("_linear_" in name for name in ran)
    assert all(any(re.match(f"metalens_{kernel}", name) for name in ran) for kernel in wanted), ran
    if not inexact:
        record_property("cell", [*astuple(cell)])
        record_property("errors", [*astuple(errors)])
    assert errors.good, f"off by {errors.ours:.2e}, plain MLX by {errors.plain:.2e}"


def test_the_matrix_holds_every_kernel_format_and_type():
    found = cells.cells()
    assert len(found) == len(set(map(str, found))) > 600
    assert {c.kernel for c in found if not c.kernel.endswith(cells.WITH_OFFSET)} == set(KERNELS)
    assert {c.kernel for c in found} - set(KERNELS) == {"lens_stats_offset", "lens_stats_vector_offset", "lens_kl_offset"}
    assert len({(c.mode, c.bits, c.group_size) for c in found if c.kernel == "lens_stats"}) == 18 + 3 + 1
    assert {c.dtype for c in found} == set(cells.TYPES)
