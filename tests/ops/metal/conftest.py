"""Print the matrix of kernels after its tests."""

from collections import defaultdict

from support.metal_cells import Cell, Errors, cells


def pytest_terminal_summary(terminalreporter):
    # The report of each test carries its cell and errors: with several workers, the process that prints has run no test.
    reports = [report for group in terminalreporter.stats.values() for report in group]
    properties = [dict(getattr(report, "user_properties", [])) for report in reports]
    results = {Cell(*found["cell"]): Errors(*found["errors"]) for found in properties if {"cell", "errors"} <= found.keys()}
    table = {cell: results[cell] for cell in cells() if cell in results}
    if not table:
        return
    shapes = list(dict.fromkeys(cell.shape for cell in table))
    terminalreporter.section("Metal kernels in emulation, checked for races, bounds and divergence: error against float64 (plain MLX's)")
    rows = defaultdict(dict)
    for cell, errors in table.items():
        form = cell.mode if cell.mode != "affine" else f"{cell.bits}-bit g{cell.group_size}"
        rows[cell.kernel, form, cell.dtype][cell.shape] = errors
    terminalreporter.write_line(f"{'kernel':26}{'weight':11}{'type':10}" + "".join(f"{shape:>22}" for shape in shapes))
    for (kernel, form, dtype), by_shape in rows.items():
        texts = [f"{by_shape[s].ours:.1e} ({by_shape[s].plain:.1e}){'' if by_shape[s].good else ' !'}" if s in by_shape else "" for s in shapes]
        terminalreporter.write_line(f"{kernel:26}{form:11}{dtype:10}" + "".join(f"{text:>22}" for text in texts))
    terminalreporter.write_line(f"{len(table)} cells, {sum(e.good for e in table.values())} good")
