"""The work of a training run: multiplications and additions, counted from shapes."""

from __future__ import annotations

from metalens.training.config import TrainingConfig
from metalens.training.polar import polynomials

# Multiplications and additions of an update for each parameter, without Muon's iterations.
UPDATE_FLOPS = {"sgd": 6, "adam": 12, "muon": 6}


def translator_params(hidden_size: int, config: TrainingConfig) -> int:
    """Count the parameters of one translator."""
    if config.bias_only:
        return hidden_size
    if config.rank is not None:
        return 2 * config.rank * hidden_size + hidden_size
    return hidden_size * hidden_size + hidden_size


def translator_flops(hidden_size: int, config: TrainingConfig) -> int:
    """Count the work of one translator and its gradient for one token."""
    if config.rank is not None:
        return 14 * config.rank * hidden_size
    return 0 if config.bias_only else 6 * hidden_size**2


def update_flops(hidden_size: int, config: TrainingConfig) -> int:
    """Count the work of an update of one layer."""
    return UPDATE_FLOPS[config.optimizer] * translator_params(hidden_size, config) + iteration_flops(hidden_size, config)


def regression_flops(hidden_size: int) -> int:
    """Count the work of a layer's sums in the warm start, for one token. Half of the symmetric sum is computed."""
    return 3 * hidden_size**2 + 7 * hidden_size


def iteration_flops(hidden_size: int, config: TrainingConfig) -> int:
    """Count the work of Muon's iterations in an update of one layer: one product each, and half of two that are symmetric."""
    if config.optimizer != "muon" or config.bias_only:
        return 0
    rows = hidden_size if config.rank is None else config.rank
    matrices = 1 if config.rank is None else 2
    iterations = len(polynomials(rows, config.ns_steps)[0])
    return iterations * matrices * (3 * rows**2 * hidden_size + rows**3)
