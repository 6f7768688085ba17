"""Options of launches, and reports about them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

SCHEDULES = ("forward", "reverse", "random", "lockstep")
TENSOR_LAYOUTS = ("permuted", "blocks")


@dataclasses.dataclass(frozen=True)
class Options:
    """See :func:`options`."""

    checked: bool = True
    schedule: str = "forward"
    seed: int = 0
    strict: bool = True
    timeout: float = 60.0
    numpy_outputs: bool = False
    stack_bytes: int = 256 * 1024
    instructions: bool = False
    inexact: bool = False
    tensor_layout: str = "permuted"


@dataclasses.dataclass
class Accesses:
    """Loads or stores as instructions of whole simdgroups, counted with ``options(instructions=True)``. README.md has the model's assumptions.

    Attributes:
        widths: {bytes per lane: instructions}. 32 stands for all widths above 16.
        lines: cache lines of device memory that the instructions touch, each instruction for itself.
        cycles: cycles that the banks of threadgroup memory take.
        conflicts: how many of those cycles are beyond the fewest that so many words can take.
    """

    widths: dict[int, int] = dataclasses.field(default_factory=dict)
    lines: int = 0
    cycles: int = 0
    conflicts: int = 0

    @property
    def instructions(self) -> int:
        """Instructions of all widths."""
        return sum(self.widths.values())


@dataclasses.dataclass
class Traffic:
    """What a launch moved to and from one buffer, in bytes and as instructions. Unique bytes count once, however often they were accessed."""

    read: int = 0
    written: int = 0
    unique_read: int = 0
    unique_written: int = 0
    loads: Accesses = dataclasses.field(default_factory=Accesses)
    stores: Accesses = dataclasses.field(default_factory=Accesses)


@dataclasses.dataclass
class Report:
    """A record of one launch. Only checked launches count traffic."""

    name: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    buffers: dict[str, Traffic]
    threadgroup_bytes: int
    threadgroup_read: int
    threadgroup_written: int
    threadgroup_loads: Accesses
    threadgroup_stores: Accesses
    matrix_ops: int
    barriers: int
    simd_ops: int
    atomics: int
    threads: int
    threadgroups: int
    seconds: float


_options = [Options()]
_recordings: list[list[Report]] = []


def current() -> Options:
    return _options[-1]


@contextlib.contextmanager
def options(**changes: object) -> Iterator[Options]:
    """Change how kernels run inside the `with` block.

    Args:
        **changes: any of

            - ``checked`` (default True): find races, out-of-bounds accesses and so on, and count traffic. Without, kernels run at -O2.
            - ``schedule``: the order of threadgroups, simdgroups and lanes: "forward", "reverse", "random" or "lockstep" (simdgroups take turns
              at every collective).
            - ``seed``: of the random schedule.
            - ``strict``: threads that return before a barrier that others reach, and simd collectives that only part of a simdgroup reaches,
              are errors.
            - ``timeout``: seconds a launch may take; 0 for no limit.
            - ``numpy_outputs``: return numpy arrays (bfloat16 as uint16) over the kernel's own memory instead of copying into mx.arrays.
            - ``stack_bytes``: thread memory of each thread.
            - ``inexact``: move every result of exp, log, tanh and so on by up to four units in the last place, and flush subnormal float32 numbers,
              as a GPU may. Each value moves always in the same way, which ``seed`` chooses. Checked launches only.
            - ``tensor_layout``: which elements of a cooperative tensor a lane holds. "permuted": elements from all over it, and between them places
              that hold none. "blocks": parts of 16 x 16 blocks, as one GPU does; code that relies on them works only there.
            - ``instructions``: count also the instructions of simdgroups, their cache lines and bank conflicts, in checked launches.
    """
    merged = dataclasses.replace(current(), **changes)  # type: ignore[arg-type]
    if merged.schedule not in SCHEDULES:
        raise ValueError(f"schedule {merged.schedule!r} is none of {', '.join(SCHEDULES)}")
    if merged.tensor_layout not in TENSOR_LAYOUTS:
        raise ValueError(f"tensor_layout {merged.tensor_layout!r} is none of {', '.join(TENSOR_LAYOUTS)}")
    _options.append(merged)
    try:
        yield merged
    finally:
        _options.pop()


@contextlib.contextmanager
def recording() -> Iterator[list[Report]]:
    """Yield a list to which each launch inside the `with` block appends its Report."""
    reports: list[Report] = []
    _recordings.append(reports)
    try:
        yield reports
    finally:
        _recordings.remove(reports)


def record(report: Report) -> None:
    for reports in _recordings:
        reports.append(report)
