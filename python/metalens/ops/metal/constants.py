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
    "IDS_PER_STEP": "lens_stats_vector.h",  # ids in a step of lens_stats_vector
    "GRAD_THREADS": "lens_softmax_grad.h",  # threads of a threadgroup of lens_softmax_grad
    "NORM_ROWS": "norm_grad.h",  # rows of a threadgroup of norm_grad
}


def __getattr__(name: str) -> int:
    if name not in HEADERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return constant(HEADERS[name], name)
