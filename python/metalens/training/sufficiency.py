"""Is there enough text for a run? If not, which settings would do with what there is?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from metalens.training.config import TrainingConfig
from metalens.training.data import Corpus, NotEnoughDataError, Sampler
from metalens.training.data.sampler import MOST_HELD
from metalens.utils.errors import InvalidValueError


def require_enough(corpus: Corpus, config: TrainingConfig, with_budget: Callable[[int], TrainingConfig]) -> None:
    """Check before a run that the text is long enough for it.

    A text that is shorter than one sequence is left to the training loop, which refuses it.

    Args:
        corpus: the text.
        config: the settings.
        with_budget: function of a number of tokens that returns the settings of the same run with this budget.

    Raises:
        NotEnoughDataError: with the tokens that are needed, those there are, and the settings that would fit.
    """
    if config.repeat or corpus.tokens < config.max_seq_len or suffices(corpus, config):
        return
    sampler = Sampler(corpus, config.max_seq_len, held_back=config.held_back_tokens, shift=config.shift)
    need = "the closed form needs"
    if config.num_steps:
        start = f"{config.warm_start_tokens} tokens of the warm start and " if config.warm_start_tokens else ""
        need = f"{start}{config.num_steps} steps of {config.step_tokens} tokens need"
    held_back = sampler.held_back_step().tokens
    beside = f" beside the {held_back} that are held back for the guard" if held_back else ""
    raise NotEnoughDataError(
        f"Not enough text: {need} {config.total_tokens} tokens, the text has {sampler.total_tokens}{beside}.",
        [*settings_that_fit(corpus, config, with_budget), {"repeat": True}],
    )


def suffices(corpus: Corpus, config: TrainingConfig) -> bool:
    """Tell whether the text is long enough for one pass of the run without repetition."""
    sampler = Sampler(corpus, config.max_seq_len, seed=config.seed, held_back=config.held_back_tokens, shift=config.shift)
    try:
        if config.warm_start_tokens:
            sampler.take_step(config.warm_start_tokens)
        sampler.require(config.step_tokens, config.num_steps)
    except NotEnoughDataError:
        return False
    return True


def settings_that_fit(corpus: Corpus, config: TrainingConfig, with_budget: Callable[[int], TrainingConfig]) -> list[dict[str, Any]]:
    """Return changes of the settings with which the text suffices, [{setting: value}, ...].

    The budget comes first, then smaller steps. Fewer steps of the same size are no advice: the number of steps decides (docs/recipes.md).
    """
    found: list[dict[str, Any]] = []
    if budget := budget_that_fits(corpus, config.max_seq_len, with_budget):
        found.append({"tokens": budget})
    if not config.num_steps:
        return found
    length = config.max_seq_len
    if count := _largest(config.sequences_per_step, lambda n: suffices(corpus, replace(config, tokens_per_step=n * length))):
        found.append({"tokens_per_step": count * length})
    return found


def budget_that_fits(corpus: Corpus, length: int, with_budget: Callable[[int], TrainingConfig]) -> int:
    """Return a budget in tokens, in round numbers, that uses most of the text; 0 if there is none.

    Whole sequences may take a little more than a budget, and the guard holds some back, so a budget of the whole text may be too much.
    """
    total = Sampler(corpus, length).total_tokens
    unit = 10 ** max(0, len(str(total)) - 2)
    for budget in range(total // unit * unit, total // 2, -unit):
        try:
            if suffices(corpus, with_budget(budget)):
                return budget
        except InvalidValueError:  # smaller than a sequence
            break
    return 0


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to a limit that fits, if all smaller ones fit too; 0 if 1 does not fit."""
    least, most = 0, limit
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def tokens_to_read(config: TrainingConfig) -> int:
    """Return the largest number of tokens that a run can need.

    Every step, and the warm start, may take up to a sequence more than it asks for; the guard may take up to MOST_HELD sequences.
    """
    held_back = MOST_HELD * config.max_seq_len if config.held_back_tokens else 0
    return config.total_tokens + (config.num_steps + 1) * config.max_seq_len + held_back
