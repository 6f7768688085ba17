"""Is there enough text for a run? If not, which settings would do with what there is?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from metalens.training.config import TrainingConfig
from metalens.training.data import Corpus, NotEnoughDataError, Sampler
from metalens.training.data.sampler import MOST_HELD


def require_enough(corpus: Corpus, config: TrainingConfig) -> None:
    """Check before a run that the text is long enough for it.

    A text that is shorter than one sequence is left to the training loop, which refuses it.

    Raises:
        NotEnoughDataError: with the tokens that are needed, those there are, and the settings that would fit.
    """
    if config.repeat or corpus.tokens < config.max_seq_len or suffices(corpus, config):
        return
    start = f"{config.warm_start_tokens} tokens of the warm start and " if config.warm_start_tokens else ""
    raise NotEnoughDataError(
        f"Not enough text: {start}{config.num_steps} steps of {config.step_tokens} tokens need {config.total_tokens} tokens, "
        f"the text has {Sampler(corpus, config.max_seq_len, held_back=config.held_back_tokens).total_tokens}.",
        [*settings_that_fit(corpus, config), {"repeat": True}],
    )


def suffices(corpus: Corpus, config: TrainingConfig) -> bool:
    """Tell whether the text is long enough for one pass of the run without repetition."""
    sampler = Sampler(corpus, config.max_seq_len, seed=config.seed, held_back=config.held_back_tokens)
    try:
        if config.warm_start_tokens:
            sampler.take_step(config.warm_start_tokens)
        sampler.require(config.step_tokens, config.num_steps)
    except NotEnoughDataError:
        return False
    return True


def settings_that_fit(corpus: Corpus, config: TrainingConfig) -> list[dict[str, Any]]:
    """Return changes of the settings with which the text suffices, [{setting: value}, ...].

    With Muon smaller steps come before fewer steps: with few tokens the number of steps decides (docs/recipes.md). Only where
    neither is enough, the warm start takes half of the text at most.
    """
    if not config.num_steps:
        tokens = _largest(config.warm_start_tokens, lambda n: suffices(corpus, replace(config, warm_start_tokens=n)))
        return [{"warm_start_tokens": tokens}] if tokens else []
    found = _smaller_or_fewer_steps(corpus, config)
    half = max(corpus.tokens // 2, 1)
    if found or half >= config.warm_start_tokens:
        return found
    shorter = _smaller_or_fewer_steps(corpus, replace(config, warm_start_tokens=half))
    return [{"warm_start_tokens": half, **change} for change in shorter[:1]]


def _smaller_or_fewer_steps(corpus: Corpus, config: TrainingConfig) -> list[dict[str, Any]]:
    found, length = [], config.max_seq_len
    if count := _largest(config.sequences_per_step, lambda n: suffices(corpus, replace(config, tokens_per_step=n * length))):
        found.append({"tokens_per_step": count * length})
    if steps := _largest(config.num_steps, lambda n: suffices(corpus, replace(config, num_steps=n))):
        found.append({"num_steps": steps})
    return found if config.optimizer == "muon" else found[::-1]


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to a limit that fits, if all smaller ones fit too; 0 if 1 does not fit."""
    least, most = 0, limit
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def tokens_to_read(config: TrainingConfig) -> int:
    """Return the largest number of tokens that a run can need.

    Every step, and the warm start, may take up to a sequence more than it asks for; the guard holds a few sequences back.
    """
    held_back = MOST_HELD * config.max_seq_len if config.held_back_tokens else 0
    return config.total_tokens + (config.num_steps + 1) * config.max_seq_len + held_back
