"""Time competitors in turn, so that other load, frequency changes and heat affect all of them alike.

One round runs every peer once, a burst at the machine's peak, our own implementation once, and another burst. A slow peer takes part
in the first rounds only. Ratios are taken within a round; their median and percentiles are reported. The fraction of the peak is our
speed divided by the mean of the two bursts around our call. On a shared machine these ratios stay constant while times drift by a factor
of two or three.

pytest-benchmark times our own call; its `setup` runs the peers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# An untimed call precedes every call shorter than this, so that caches and threads are in the state that a loop would leave them in.
QUICK_SECONDS = 0.05
# A pause precedes it too: the previous competitor's OpenMP threads spin for some milliseconds after their work.
PAUSE_SECONDS = 0.01


@dataclass(frozen=True)
class Side:
    """A competitor in a round.

    Attributes:
        name: name in the report.
        call: function that runs the competitor once.
        expected: seconds that an earlier call took.
        seconds: function that runs the competitor once and returns its own measurement of the time; None = `call` is timed.
    """

    name: str
    call: Callable[[], Any]
    expected: float
    seconds: Callable[[], float] | None = None

    @property
    def round_seconds(self) -> float:
        """Return the seconds that this competitor adds to a round."""
        return self.expected * (2 if self.expected < QUICK_SECONDS else 1)

    def settle(self) -> None:
        """Pause and run an untimed call, if the timed call will be short."""
        if self.expected < QUICK_SECONDS:
            time.sleep(PAUSE_SECONDS)
            self.call()

    def timed(self) -> float:
        """Settle, run one call, and return its seconds."""
        if self.seconds is not None:
            time.sleep(PAUSE_SECONDS)
            return self.seconds()
        self.settle()
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start


@dataclass
class Rounds:
    """Measurements of n rounds, in order.

    Attributes:
        ours: seconds of our call in each round.
        peers: seconds of each peer's call in each round that it took part in.
        bursts: (before, after) pairs of the bursts around our call, in FLOP/s or bytes/s; empty if no burst was run.
    """

    ours: list[float] = field(default_factory=list)
    peers: dict[str, list[float]] = field(default_factory=dict)
    bursts: list[tuple[float, float]] = field(default_factory=list)

    def ratios(self, peer: str) -> dict[str, float]:
        """Return the percentiles of the peer's time divided by ours, taken within a round."""
        return percentiles([theirs / ours for theirs, ours in zip(self.peers[peer], self.ours, strict=False)])

    def peak(self) -> dict[str, float]:
        """Return the percentiles of the bursts around our calls."""
        return percentiles([sum(pair) / 2 for pair in self.bursts])

    def fractions(self, amount: float) -> dict[str, float]:
        """Return the percentiles of our speed divided by that of the bursts around it, for calls that do `amount` of work."""
        return percentiles([amount / ours / (sum(pair) / 2) for ours, pair in zip(self.ours, self.bursts, strict=True)])


def percentiles(values: list[float]) -> dict[str, float]:
    """Return the 20th, 50th and 80th percentile."""
    return {f"p{p}": float(np.percentile(values, p)) for p in (20, 50, 80)}


def number_of_rounds(side: Side, budget: float, most: int, least: int = 3) -> int:
    """Return the number of rounds of one competitor that fit into `budget` seconds, between `least` and `most`."""
    return max(least, min(most, int(budget / (0.1 + side.round_seconds))))


def interleave(benchmark: Any, sides: list[Side], budget: float, most: int, least: int, burst: Callable[[], float] | None) -> Rounds:
    """Run rounds for about `budget` seconds.

    Args:
        benchmark: pytest-benchmark's fixture.
        sides: competitors; pytest-benchmark times the first, ours, and the others run before it in this order.
        budget: seconds for all rounds, divided equally between the competitors: a slow one takes part in the first rounds only.
        most: largest number of rounds.
        least: smallest number of rounds.
        burst: function that runs for some 50 ms at the machine's peak and returns its rate; None = no bursts.
    """
    ours, *peers = sides
    result = Rounds(peers={peer.name: [] for peer in peers})
    before: list[float] = []
    budget_of_each = budget / len(sides)
    rounds = number_of_rounds(ours, budget_of_each, most, least)
    rounds_of = {peer.name: number_of_rounds(peer, budget_of_each, rounds, least) for peer in peers}

    def setup() -> None:
        for peer in peers:
            if len(before) < rounds_of[peer.name]:
                result.peers[peer.name].append(peer.timed())
        before.append(burst() if burst is not None else 0.0)
        ours.settle()

    def teardown() -> None:
        if burst is not None:
            result.bursts.append((before[-1], burst()))

    benchmark.pedantic(ours.call, setup=setup, teardown=teardown, rounds=rounds)
    result.ours = list(benchmark.stats.stats.data)
    return result
