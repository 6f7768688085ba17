"""One way of computing a problem, and the reasons for leaving one out."""

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
    """Why a competitor does not take part, in a sentence."""


@dataclass(frozen=True)
class Competitor:
    """One way of computing a problem.

    Attributes:
        run: computes so many units (rows or tokens) of the problem, None = all, and returns when the result is there.
        arrays: that result as NumPy arrays, in an order that all competitors of a problem share.
        units: how many there are.
    """

    run: Callable[[int | None], Any]
    arrays: Callable[[Any], list[np.ndarray]]
    units: int

    def seconds(self, units: int | None = None) -> float:
        """Of one call."""
        start = time.perf_counter()
        self.run(units)
        return time.perf_counter() - start


def mlx_competitor(name: str, units: int, compute: Callable[[int], list[mx.array]]) -> Competitor:
    """metalens's own operation, on the backend and with the precision that the name stands for."""

    def run(wanted: int | None) -> list[mx.array]:
        with ExitStack() as stack:
            stack.enter_context(use_backend("reference" if name == PLAIN else "native"))
            stack.enter_context(use_precision("bf16" if name == OURS_BF16 else "float32"))
            results = compute(units if wanted is None else wanted)
            mx.eval(results)
        return results

    return Competitor(run, lambda results: [np.array(a.astype(mx.float32)) for a in results], units)


def torch_competitor(units: int, compute: Callable[[int], list[Any]]) -> Competitor:
    """A PyTorch function."""
    return Competitor(
        lambda wanted: compute(units if wanted is None else wanted), lambda results: [a.detach().float().numpy() for a in results], units
    )


def torch_module() -> ModuleType:
    """PyTorch, on all cores.

    Raises:
        LeftOutError: where it is not installed.
    """
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        raise LeftOutError("PyTorch is not installed (the extra `bench`).") from None
    torch.set_num_threads(cores())
    return torch


def tensor(a: mx.array) -> Any:
    """An MLX array as a float32 (or int64) tensor with memory of its own."""
    integer = mx.issubdtype(a.dtype, mx.integer)
    return torch_module().from_numpy(np.array(a.astype(mx.int64 if integer else mx.float32)))


def probe(competitor: Competitor, limit: float) -> None:
    """Time a small slice first, so that nobody waits for a competitor that is pathologically slow here.

    Raises:
        LeftOutError: if one call would take longer than `limit` seconds.
    """
    for units in (1, max(1, competitor.units // 8)):
        seconds = competitor.seconds(units)
        if seconds < 1:
            seconds = min(seconds, competitor.seconds(units), competitor.seconds(units))  # without what only the first call does
        expected = seconds * competitor.units / units
        if expected <= limit:
            return
        if expected > 8 * limit:  # then the second slice would itself take as long as is allowed
            break
    measured = f"{seconds:.2g} s for {units} of {competitor.units} tokens or rows"
    raise LeftOutError(f"One call would take about {expected:.0f} s here ({measured}); the limit is {limit:.0f} s.")
