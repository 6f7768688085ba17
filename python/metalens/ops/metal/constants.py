"""The constants of the headers in metal/, as attributes: `constants.TILE_IDS`.

A header is read when one of its constants is first used, so the package can be imported without the headers.
"""

from __future__ import annotations

from metalens.ops.metal.source import constant

HEADERS = {
    "LANES": "common.h",  # lanes of a simdgroup
    "SIMDS": "common.h",  # simdgroups of a threadgroup
    "THREADS": "common.h",  # threads of a threadgroup
    "MAP_WIDTH": "common.h",  # ids that share one entry of lens_softmax_grad's map
    "TILE_IDS": "tile.h",  # width of a tile: ids, if the matrix is the head
    "TILE_DEPTH": "tile.h",  # terms of the reduction in a step of a tile
    "FIELDS": "stats_rows.h",  # floats in the state of a row
    "VECTOR_ROWS": "vector_product.h",  # rows of the block of lens_stats_vector
    "VECTOR_SIMDS": "vector_product.h",  # simdgroups of a threadgroup of lens_stats_vector; each takes a split of its own
    "VECTOR_THREADS": "vector_product.h",  # threads of a threadgroup of lens_stats_vector
    "VECTOR_IDS": "vector_product.h",  # ids that a split of lens_stats_vector must not divide
    "VECTOR_PASS": "lens_stats_vector.h",  # ids of a split of lens_stats_vector in one pass over the rows
    "VECTOR_STEP": "vector_product.h",  # columns that a step of lens_stats_vector multiplies
    "ROW_SIMDS": "row_group.h",  # simdgroups of a threadgroup that reads a row of logits
    "ROW_THREADS": "row_group.h",  # threads of a threadgroup that reads a row of logits
    "NORM_ROWS": "norm_grad.h",  # largest number of rows of a threadgroup of norm_grad
}


def __getattr__(name: str) -> int:
    if name not in HEADERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return constant(HEADERS[name], name)
