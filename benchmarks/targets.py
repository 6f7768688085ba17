"""Targets beside what was measured: the verdict follows from the results."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A target and its measurement.

    Attributes:
        wanted: what was to be reached, without a full stop.
        measured: what was reached, without a full stop.
        met: whether that is enough.
        bound: sentences that say what bounds it, shown where the target is missed.
    """

    wanted: str
    measured: str
    met: bool
    bound: str = ""

    def __str__(self) -> str:
        """Return the target as an item of a list."""
        verdict = "Met." if self.met else f"Missed. {self.bound}".rstrip()
        return f"- Target: {self.wanted}. Measured: {self.measured}. **{verdict.split()[0]}**{verdict.removeprefix(verdict.split()[0])}"
