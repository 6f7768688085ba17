"""Times competitors in turn, so that what the machine does meanwhile (other users, frequency, heat) hits all of them alike.

One round is: every peer once, a burst at the machine's peak, our own implementation once, another burst. (A slow peer takes part in the first
rounds only.) Ratios are taken within a round and summed up
by their median and percentiles; so is the fraction of the peak, which is that of the two bursts around our own call. On a shared machine such
ratios stay put while times drift by a factor of two or three.

Our own call is timed by pytest-benchmark, the peers in its `setup`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# A call shorter than this is preceded by an untimed one, so that caches and threads are as they would be in a loop ...
QUICK_SECONDS = 0.05
# ... and by a pause, in which the threads of the competitor before it stop spinning for work: OpenMP's do so for some milliseconds.
PAUSE_SECONDS = 0.01


@dataclass(frozen=True)
class Side:
    """A competitor as a round sees it.

    Attributes:
        name: for the report.
        call: one call.
        expected: seconds that a call took before.
        seconds: the time of one call, measured by the competitor; None = time `call`.
    """

    name: str
    call: Callable[[], Any]
    expected: float
    seconds: Callable[[], float] | None = None

    @property
    def round_seconds(self) -> float:
        """What a round with it takes."""
        return self.expected * (2 if self.expected < QUICK_SECONDS else 1)

    def settle(self) -> None:
        """Whatever must come between the call before and this one."""
        if self.expected < QUICK_SECONDS:
            time.sleep(PAUSE_SECONDS)
            self.call()

    def timed(self) -> float:
        """Seconds of one call, after it has settled."""
        if self.seconds is not None:
            time.sleep(PAUSE_SECONDS)
            return self.seconds()
        self.settle()
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start


@dataclass
class Rounds:
    """What n rounds gave, in their order.

    Attributes:
        ours: seconds of our call.
        peers: seconds of each peer's.
        bursts: (before, after) our call, FLOP/s or bytes/s; empty without a burst.
    """

    ours: list[float] = field(default_factory=list)
    peers: dict[str, list[float]] = field(default_factory=dict)
    bursts: list[tuple[float, float]] = field(default_factory=list)

    def ratios(self, peer: str) -> dict[str, float]:
        """How many times as long the peer took, within a round."""
        return percentiles([theirs / ours for theirs, ours in zip(self.peers[peer], self.ours, strict=False)])

    def peak(self) -> dict[str, float]:
        """The bursts around our calls."""
        return percentiles([sum(pair) / 2 for pair in self.bursts])

    def fractions(self, amount: float) -> dict[str, float]:
        """Of the bursts around it, the speed of a call that does `amount` of work."""
        return percentiles([amount / ours / (sum(pair) / 2) for ours, pair in zip(self.ours, self.bursts, strict=True)])


def percentiles(values: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th."""
    return {f"p{p}": float(np.percentile(values, p)) for p in (20, 50, 80)}


def number_of_rounds(side: Side, budget: float, most: int, least: int = 3) -> int:
    """As many rounds of one competitor as fit into `budget` seconds."""
    return max(least, min(most, int(budget / (0.1 + side.round_seconds))))


def interleave(benchmark: Any, ours: Side, peers: list[Side], budget: float, most: int, least: int, burst: Callable[[], float] | None) -> Rounds:
    """Run rounds for about `budget` seconds.

    Args:
        benchmark: pytest-benchmark's fixture; it times `ours`.
        ours: timed by pytest-benchmark.
        peers: run before it, in this order.
        budget: seconds for all rounds, shared equally by all competitors: a slow one takes part in the first rounds only.
        most, least: bounds of the number of rounds.
        burst: runs for some 50 ms at the machine's peak and returns its rate; None = no bursts.
    """
    result = Rounds(peers={peer.name: [] for peer in peers})
    before: list[float] = []
    share = budget / (1 + len(peers))
    rounds = number_of_rounds(ours, share, most, least)
    takes_part = {peer.name: number_of_rounds(peer, share, rounds, least) for peer in peers}

    def setup() -> None:
        for peer in peers:
            if len(before) < takes_part[peer.name]:
                result.peers[peer.name].append(peer.timed())
        before.append(burst() if burst is not None else 0.0)
        ours.settle()

    def teardown() -> None:
        if burst is not None:
            result.bursts.append((before[-1], burst()))

    benchmark.pedantic(ours.call, setup=setup, teardown=teardown, rounds=rounds)
    result.ours = list(benchmark.stats.stats.data)
    return result
