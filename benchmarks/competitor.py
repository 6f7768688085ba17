"""Describe one implementation of a problem, and the reasons to leave it out."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
from benchmarks.peaks import cores

from metalens import use_backend
from metalens.ops import use_precision

OURS, OURS_BF16, PLAIN = "metalens", "metalens bf16", "plain MLX"
TORCH, TORCH_BF16, TORCH_INT4 = "PyTorch float32", "PyTorch bf16", "PyTorch int4"


class LeftOutError(Exception):
    """Raised with the reason, in a sentence, why a competitor does not take part."""


@dataclass(frozen=True)
class Competitor:
    """One implementation of a problem.

    Attributes:
        run: function that computes the given number of units (rows or tokens) of the problem, None = all, and returns the
            finished result.
        arrays: function that converts a result to NumPy arrays; all competitors of a problem use the same order.
        units: number of units in the problem.
    """

    run: Callable[[int | None], Any]
    arrays: Callable[[Any], list[np.ndarray]]
    units: int

    def seconds(self, units: int | None = None) -> float:
        """Run one call and return its seconds."""
        start = time.perf_counter()
        self.run(units)
        return time.perf_counter() - start


def mlx_competitor(name: str, units: int, compute: Callable[[int], list[mx.array]]) -> Competitor:
    """Return a competitor that runs metalens, on the backend and with the precision that `name` stands for."""

    def run(wanted: int | None) -> list[mx.array]:
        with ExitStack() as stack:
            stack.enter_context(use_backend("reference" if name == PLAIN else "native"))
            stack.enter_context(use_precision("bfloat16" if name == OURS_BF16 else "float32"))
            results = compute(units if wanted is None else wanted)
            mx.eval(results)
        return results

    return Competitor(run, lambda results: [np.array(a.astype(mx.float32)) for a in results], units)


def torch_competitor(units: int, compute: Callable[[int], list[Any]]) -> Competitor:
    """Return a competitor that runs a PyTorch function."""
    return Competitor(
        lambda wanted: compute(units if wanted is None else wanted), lambda results: [a.detach().float().numpy() for a in results], units
    )


def torch_module() -> ModuleType:
    """Return the PyTorch module, set to use all cores.

    Raises:
        LeftOutError: if PyTorch is not installed.
    """
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise LeftOutError("PyTorch is not installed (the extra `bench`).") from None
    torch.set_num_threads(cores())
    return torch


def tensor(a: mx.array) -> Any:
    """Copy an MLX array into a float32 tensor, or into an int64 tensor if it holds integers."""
    integer = mx.issubdtype(a.dtype, mx.integer)
    return torch_module().from_numpy(np.array(a.astype(mx.int64 if integer else mx.float32)))


def probe(competitor: Competitor, limit: float) -> None:
    """Time a small part first, so that a run never waits for a competitor that is pathologically slow here.

    Raises:
        LeftOutError: if one call would take longer than `limit` seconds.
    """
    for units in (1, max(1, competitor.units // 8)):
        seconds = competitor.seconds(units)
        if seconds < 1:
            seconds = min(seconds, competitor.seconds(units), competitor.seconds(units))  # without the cost of the first call
        expected = seconds * competitor.units / units
        if expected <= limit:
            return
        if expected > 8 * limit:  # then the second part alone would take as long as the limit
            break
    measured = f"{seconds:.2g} s for {units} of {competitor.units} tokens or rows"
    raise LeftOutError(f"One call would take about {expected:.0f} s here ({measured}); the limit is {limit:.0f} s.")
