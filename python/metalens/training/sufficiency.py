"""Is there enough text for a run? If not, which settings would do with what there is?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from metalens.training.config import TrainingConfig
from metalens.training.data import Corpus, NotEnoughDataError, Sampler


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
        f"the text has {Sampler(corpus, config.max_seq_len).total_tokens}.",
        [*settings_that_fit(corpus, config), {"repeat": True}],
    )


def suffices(corpus: Corpus, config: TrainingConfig) -> bool:
    """Tell whether the text is long enough for one pass of the run without repetition."""
    sampler = Sampler(corpus, config.max_seq_len, seed=config.seed)
    try:
        if config.warm_start_tokens:
            sampler.take_step(config.warm_start_tokens)
        sampler.require(config.step_tokens, config.num_steps)
    except NotEnoughDataError:
        return False
    return True


def settings_that_fit(corpus: Corpus, config: TrainingConfig) -> list[dict[str, Any]]:
    """Return changes of the settings with which the text suffices, [{setting: value}, ...].

    Fewer steps or smaller steps come first. Only where neither is enough, the warm start takes half of the text at most.
    """
    found = _fewer_or_smaller_steps(corpus, config)
    half = max(corpus.tokens // 2, 1)
    if found or half >= config.warm_start_tokens:
        return found
    shorter = _fewer_or_smaller_steps(corpus, replace(config, warm_start_tokens=half))
    return [{"warm_start_tokens": half, **change} for change in shorter[:1]]


def _fewer_or_smaller_steps(corpus: Corpus, config: TrainingConfig) -> list[dict[str, Any]]:
    found, length = [], config.max_seq_len
    if steps := _largest(config.num_steps, lambda n: suffices(corpus, replace(config, num_steps=n))):
        found.append({"num_steps": steps})
    if count := _largest(config.sequences_per_step, lambda n: suffices(corpus, replace(config, tokens_per_step=n * length))):
        found.append({"tokens_per_step": count * length})
    return found


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to a limit that fits, if all smaller ones fit too; 0 if 1 does not fit."""
    least, most = 0, limit
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least


def tokens_to_read(config: TrainingConfig) -> int:
    """Return the largest number of tokens that a run can need: every step, and the warm start, may take up to a sequence more than it asks for."""
    return config.total_tokens + (config.num_steps + 1) * config.max_seq_len
