"""Runs one case of a suite: makes the competitors, checks that they agree, times them in turn, and leaves the numbers in `extra_info`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from benchmarks.competitor import OURS_BF16, TORCH, Competitor, LeftOutError, probe
from benchmarks.interleaved import Side, interleave, percentiles
from benchmarks.peaks import BURST_SECONDS, FMA, Peaks
from benchmarks.worker import Worker, extra_memory

# Of the norm. Loose: it is there so that nobody times a wrong result; what the kernels must hold is in tests/.
TOLERANCE, TOLERANCE_BF16 = 2e-3, 0.1


@dataclass(frozen=True)
class Work:
    """What one call does.

    Attributes:
        amount: in `unit` seconds, e.g. FLOP for FLOP/s.
        unit: of the speed.
        peak: the burst that the speed is a fraction of, by its name in `peaks`; None = no such thing.
    """

    amount: float
    unit: str = "FLOP/s"
    peak: str | None = FMA


@dataclass
class Suite:
    """The settings of this run, and pytest-benchmark's fixture of this test."""

    benchmark: Any
    peaks: Peaks
    quick: bool

    def measure(
        self,
        module: ModuleType,
        arguments: dict[str, Any],
        names: Sequence[str],
        label: str,
        work: Work,
        *,
        title: str,
        isas: Sequence[str] = (),
        memory_of: Sequence[str] = (),
        limit: float = 20.0,
        budget: float = 10.0,
        most_rounds: int = 25,
        least_rounds: int = 3,
    ) -> None:
        """Time names[0] of `module` beside the others.

        Args:
            module: of `benchmarks.operations`.
            arguments: of its `make`.
            names: of competitors; the first is ours.
            label: of the case, in the report.
            work: what one call does.
            title: of the report's table.
            isas: instruction sets to run ours on as well, each in a process of its own.
            memory_of: whose extra memory to measure.
            limit: leave out peers (but PyTorch in float32) of whom one call would take longer than so many seconds.
            budget: seconds for all rounds together.
            most_rounds, least_rounds: bounds of their number.
        """
        if names[0] == OURS_BF16 and self.peaks.bf16 is None:
            pytest.skip("This CPU has no bfloat16 multiply: precision 'bf16' is the same as 'float32' here.")
        mx.clear_cache()  # of the case before
        quick = 4 if self.quick else 1
        left_out: dict[str, str] = {}
        sides: list[Side] = []
        differences: dict[str, float] = {}
        expected: list[np.ndarray] | None = None
        for name in names:
            try:
                competitor = module.make(name, **arguments)
                if sides and name != TORCH:
                    probe(competitor, limit / quick)
                side, arrays = _first_call(name, competitor)
            except LeftOutError as reason:
                if not sides:
                    pytest.skip(str(reason))
                left_out[name] = str(reason)
                continue
            expected = arrays if expected is None else expected
            differences[name] = agreement(arrays, expected, name, names[0])
            sides.append(side)
        with ExitStack() as workers:
            for isa in isas:
                worker = workers.enter_context(Worker(f"operations.{module.__name__.rpartition('.')[2]}", names[0], arguments, {"METALENS_ISA": isa}))
                sides.append(Side(f"{names[0]}, {isa}", worker.seconds, worker.seconds(), worker.seconds))
            burst = partial(self.peaks.burst, work.peak, BURST_SECONDS) if work.peak else None
            result = interleave(self.benchmark, sides[0], sides[1:], budget / quick, most_rounds, least_rounds, burst)
        info: dict[str, Any] = {"title": title, "label": label, "name": names[0], "rounds": len(result.ours), "seconds": percentiles(result.ours)}
        info |= {"amount": work.amount, "unit": work.unit, "speed": percentiles([work.amount / seconds for seconds in result.ours])}
        if work.peak:
            info |= {"peak": work.peak, "peak_speed": result.peak(), "fraction_of_peak": result.fractions(work.amount)}
        info["peers"] = {
            peer: {"rounds": len(times), "seconds": percentiles(times), "ratio": result.ratios(peer)}
            | ({"difference": differences[peer]} if peer in differences else {})
            for peer, times in result.peers.items()
        }
        info["left_out"] = left_out
        info["extra_bytes"] = {
            name: extra_memory(f"operations.{module.__name__.rpartition('.')[2]}", name, arguments) for name in memory_of if name not in left_out
        }
        self.benchmark.group = title
        self.benchmark.extra_info |= info


def _first_call(name: str, competitor: Competitor) -> tuple[Side, list[np.ndarray]]:
    """Its result, and how long to expect a call to take."""
    start = time.perf_counter()
    arrays = competitor.arrays(competitor.run(None))
    seconds = time.perf_counter() - start
    if seconds < 1:
        seconds = competitor.seconds()
    return Side(name, partial(competitor.run, None), seconds), arrays


def agreement(arrays: list[np.ndarray], expected: list[np.ndarray], name: str, first: str) -> float:
    """The largest difference of an array from the `first` competitor's, relative to its norm; asserted to be small."""
    difference = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(arrays, expected, strict=True))
    tolerance = TOLERANCE_BF16 if "bf16" in name + first else TOLERANCE
    assert difference < tolerance, f"{name} is off by {difference:.2g} of the norm."
    return difference
