"""The time of a run on this machine, and the budget that fits into a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metalens.models.facts import ModelFacts
from metalens.training.config import TrainingConfig
from metalens.training.settings import resolve
from metalens.training.speed import Duration, budget_in, seconds_of
from metalens.training.speed_probe import measured_speed

LONG, SHORT = 3600.0, 600.0  # seconds: a run of more than LONG is told which budget takes SHORT


def time_of(
    facts: ModelFacts, recipe: str | None, config: TrainingConfig, *, layers: int, passes: int, processes: int, share: float, from_lens: bool
) -> tuple[Duration, int | None]:
    """Return the duration of a run on this machine, and if it is long, the budget in tokens that takes ten minutes, else None.

    Args:
        facts: facts of the model.
        recipe: name of the recipe, or None.
        config: the settings.
        layers, passes, processes, share: as in `metalens.training.speed.seconds_of`.
        from_lens: whether the run starts from a lens.
    """
    speed = measured_speed(facts)

    def duration(config: TrainingConfig) -> Duration:
        return seconds_of(facts, config, speed, layers=layers, passes=passes, processes=processes, share=share)

    def budgeted(tokens: int) -> TrainingConfig:
        return resolve(recipe, config, {"tokens": tokens}, facts.context_length, facts.dimensions.hidden_size, from_lens=from_lens)[1]

    found = duration(config)
    short = budget_in(SHORT, budgeted, duration) if found.total > LONG else None
    if short is not None and duration(budgeted(short)).total > 1.5 * SHORT:  # the smallest budget takes longer
        short = None
    return found, short


def tokens_in(
    minutes: float,
    facts: ModelFacts,
    recipe: str | None,
    config: TrainingConfig | Mapping[str, Any] | str | Path | None,
    settings: Mapping[str, Any],
    processes: int,
    share: float,
    from_lens: bool,
) -> int:
    """Return the budget in tokens that fits into the minutes. Arguments as in `plan`, `seconds_of` and `time_of`."""
    speed, of_model = measured_speed(facts), (facts.context_length, facts.dimensions.hidden_size)
    return budget_in(
        60 * minutes,
        lambda tokens: resolve(recipe, config, {**settings, "tokens": tokens}, *of_model, from_lens=from_lens)[1],
        lambda changed: seconds_of(facts, changed, speed, processes=processes, share=share),
    )
