"""Run every cell of the matrix in emulation with all checks: races, bounds, divergence, uninitialized memory, limits; values against float64."""

import re

import pytest

import mslcpu
from support import metal_cells as cells
from support.metal_emulation import emulated, needs_clang

pytestmark = needs_clang


# The kernels that must have run for a cell: the beginnings of their names, as regular expressions.
KERNELS = {
    "lens_stats": (r"lens_stats_(float|half|bfloat)_", "lens_stats_merge"),
    "lens_stats_vector": ("lens_stats_vector_", "lens_stats_merge"),
    "linear": ("linear_",),
    "lens_kl": ("linear_", "lens_softmax_grad_", "lens_backward_"),
    "translate_norm_rms": ("linear_", "norm_grad"),
    "translate_norm_layer": ("linear_", "norm_grad"),
}


@pytest.mark.parametrize("cell", cells.cells(), ids=str)
def test_cell(cell):
    with emulated(), mslcpu.recording() as reports:
        errors = cells.run(cell)
    ran = {report.name for report in reports}
    assert all(any(re.match(f"metalens_{kernel}", name) for name in ran) for kernel in KERNELS[cell.kernel.removesuffix(cells.WITH_OFFSET)]), ran
    cells.RESULTS[cell] = errors
    assert errors.good, f"off by {errors.ours:.2e}, plain MLX by {errors.plain:.2e}"


def test_the_matrix_holds_every_kernel_format_and_type():
    found = cells.cells()
    assert len(found) == len(set(map(str, found))) > 600
    assert {c.kernel for c in found if not c.kernel.endswith(cells.WITH_OFFSET)} == set(KERNELS)
    assert {c.kernel for c in found} - set(KERNELS) == {"lens_stats_offset", "lens_stats_vector_offset", "lens_kl_offset"}
    assert len({(c.mode, c.bits, c.group_size) for c in found if c.kernel == "lens_stats"}) == 18 + 3 + 1
    assert {c.dtype for c in found} == set(cells.TYPES)
