"""Run one case of a suite: make the competitors, check that they agree, time them in turn, and write the numbers into `extra_info`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from benchmarks.competitor import OURS_BF16, TORCH, Competitor, LeftOutError, probe
from benchmarks.interleaved import Rounds, Side, interleave, percentiles
from benchmarks.peaks import BURST_SECONDS, FMA, Peaks
from benchmarks.worker import Worker, extra_memory

# Largest difference relative to the norm. It is loose, because it only prevents the timing of a wrong result; tests/ checks accuracy.
TOLERANCE, TOLERANCE_BF16 = 2e-3, 0.1
# Quick mode divides the limit and the budget by this.
QUICK_DIVISOR = 4


@dataclass(frozen=True)
class Work:
    """The work of one call.

    Attributes:
        amount: units of work in one call, e.g. FLOP.
        unit: unit of the speed, e.g. FLOP/s.
        peak: name in `peaks` of the burst that the speed is compared with; None = no burst.
    """

    amount: float
    unit: str = "FLOP/s"
    peak: str | None = FMA


@dataclass(frozen=True)
class Case:
    """One line of the report: a problem of one shape, and the competitors that compute it.

    Attributes:
        operation: module of `benchmarks.operations`.
        arguments: arguments of the module's `make`, as JSON can hold them.
        names: names of the competitors; the first is ours.
        title: title of the report's table.
        label: label of the case in that table.
        work: work of one call.
        isas: further instruction sets for ours, each run in its own process.
        memory_of: competitors whose extra memory is measured.
        tolerance: largest difference between competitors, relative to the norm; with 16-bit operands it is at least TOLERANCE_BF16.
    """

    operation: ModuleType
    arguments: dict[str, Any]
    names: Sequence[str]
    title: str
    label: str
    work: Work
    isas: Sequence[str] = ()
    memory_of: Sequence[str] = ()
    tolerance: float = TOLERANCE

    @property
    def ours(self) -> str:
        """Return the name of our competitor."""
        return self.names[0]

    @property
    def module(self) -> str:
        """Return the operation's name for a worker."""
        return f"operations.{self.operation.__name__.rpartition('.')[2]}"


@dataclass(frozen=True)
class Effort:
    """Bounds of the time that a case may take.

    Attributes:
        limit: seconds that one call of a peer may take; slower peers are left out, except PyTorch in float32.
        budget: seconds for all rounds together.
        least_rounds: smallest number of rounds.
        most_rounds: largest number of rounds.
    """

    limit: float = 20.0
    budget: float = 10.0
    least_rounds: int = 3
    most_rounds: int = 25


@dataclass
class Entrants:
    """The competitors of a case that take part, and those that do not.

    Attributes:
        sides: competitors that take part, ours first.
        differences: each competitor's largest difference from ours, relative to the norm.
        left_out: reasons of the competitors that do not take part.
    """

    sides: list[Side] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass
class Suite:
    """Settings of this run, and pytest-benchmark's fixture of this test.

    Attributes:
        benchmark: pytest-benchmark's fixture.
        peaks: peaks of this machine.
        quick: whether only the small shapes run, for a shorter time.
    """

    benchmark: Any
    peaks: Peaks
    quick: bool

    def measure(self, case: Case, effort: Effort | None = None) -> None:
        """Time our competitor and its peers, and write the numbers into pytest-benchmark's `extra_info`.

        Skips the test if ours cannot run here.
        """
        effort = effort or Effort()
        if case.ours == OURS_BF16 and self.peaks.bf16 is None:
            pytest.skip("This CPU has no bfloat16 multiply: precision 'bfloat16' is the same as 'float32' here.")
        mx.clear_cache()  # of the case before
        divisor = QUICK_DIVISOR if self.quick else 1
        entrants = enter(case, effort.limit / divisor)
        with ExitStack() as workers:
            entrants.sides += [workers.enter_context(_isa_worker(case, isa)).side(f"{case.ours}, {isa}") for isa in case.isas]
            burst = partial(self.peaks.burst, case.work.peak, BURST_SECONDS) if case.work.peak else None
            rounds = interleave(self.benchmark, entrants.sides, effort.budget / divisor, effort.most_rounds, effort.least_rounds, burst)
        self.benchmark.group = case.title
        self.benchmark.extra_info |= summary(case, entrants, rounds)


def enter(case: Case, limit: float) -> Entrants:
    """Make the competitors of a case, and check that each agrees with ours.

    Competitors that cannot run, or whose call takes longer than `limit` seconds, are left out.
    """
    entrants = Entrants()
    expected: list[np.ndarray] | None = None
    for name in case.names:
        try:
            competitor = case.operation.make(name, **case.arguments)
            if entrants.sides and name != TORCH:
                probe(competitor, limit)
            side, arrays = _first_call(name, competitor)
        except LeftOutError as reason:
            if not entrants.sides:
                pytest.skip(str(reason))
            entrants.left_out[name] = str(reason)
            continue
        expected = arrays if expected is None else expected
        entrants.differences[name] = agreement(arrays, expected, name, case)
        entrants.sides.append(side)
    return entrants


def summary(case: Case, entrants: Entrants, rounds: Rounds) -> dict[str, Any]:
    """Return the numbers of a case as the report reads them."""
    work = case.work
    info: dict[str, Any] = {"title": case.title, "label": case.label, "name": case.ours}
    info |= {"rounds": len(rounds.ours), "seconds": percentiles(rounds.ours), "amount": work.amount, "unit": work.unit}
    info["speed"] = percentiles([work.amount / seconds for seconds in rounds.ours])
    if work.peak:
        info |= {"peak": work.peak, "peak_speed": rounds.peak(), "fraction_of_peak": rounds.fractions(work.amount)}
    info["peers"] = {
        peer: {"rounds": len(times), "seconds": percentiles(times), "ratio": rounds.ratios(peer)}
        | ({"difference": entrants.differences[peer]} if peer in entrants.differences else {})
        for peer, times in rounds.peers.items()
    }
    info["left_out"] = entrants.left_out
    measured = [name for name in case.memory_of if name not in entrants.left_out]
    info["extra_bytes"] = {name: extra_memory(case.module, name, case.arguments) for name in measured}
    return info


def _isa_worker(case: Case, isa: str) -> Worker:
    """Start our competitor in a process of its own that uses this instruction set."""
    return Worker(case.module, case.ours, case.arguments, {"METALENS_ISA": isa})


def _first_call(name: str, competitor: Competitor) -> tuple[Side, list[np.ndarray]]:
    """Run a competitor once; return it with the seconds to expect of a call, and its result."""
    start = time.perf_counter()
    arrays = competitor.arrays(competitor.run(None))
    seconds = time.perf_counter() - start
    if seconds < 1:
        seconds = competitor.seconds()
    return Side(name, partial(competitor.run, None), seconds), arrays


def agreement(arrays: list[np.ndarray], expected: list[np.ndarray], name: str, case: Case) -> float:
    """Return the largest difference of an array from our competitor's, relative to its norm, and assert that it is small."""
    difference = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(arrays, expected, strict=True))
    tolerance = max(case.tolerance, TOLERANCE_BF16) if "bf16" in name + case.ours else case.tolerance
    assert difference < tolerance, f"{name} differs from {case.ours} by {difference:.2g} of the norm; {tolerance:g} is allowed."
    return difference
