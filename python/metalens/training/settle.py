"""From what the caller wishes to what a run does: its settings and its text, which fit each other and the model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from metalens.models.facts import facts_of_model
from metalens.models.language_model import LanguageModel
from metalens.models.tokenization import NO_TOKENIZER
from metalens.training.checkpoint import config_of_newest
from metalens.training.config import TrainingConfig
from metalens.training.data import Corpus, open_corpus
from metalens.training.data.hub import HubDataset
from metalens.training.data.readers import Source
from metalens.training.distributed import Group
from metalens.training.resume import with_older_defaults
from metalens.training.settings import budget_in_minutes, resolve
from metalens.training.speed import budget_in, seconds_of
from metalens.training.speed_probe import measured_speed
from metalens.training.sufficiency import budget_that_fits, require_enough, suffices, tokens_to_read
from metalens.utils.errors import InvalidValueError
from metalens.utils.progress_bar import PhaseBar


@dataclass(frozen=True)
class Wishes:
    """The settings as the caller gives them; arguments as in `train`.

    Attributes:
        recipe: name of a recipe, or None.
        config: more settings: a file, a dict or a TrainingConfig.
        settings: settings by name, 'tokens' (a budget) among them.
        minutes: budget in minutes, or None.
        from_lens: whether the run starts from a lens.
    """

    recipe: str | None
    config: TrainingConfig | Mapping[str, Any] | str | Path | None
    settings: Mapping[str, Any]
    minutes: float | None
    from_lens: bool = False

    @classmethod
    def of(
        cls,
        recipe: str | None,
        config: TrainingConfig | Mapping[str, Any] | str | Path | None,
        settings: Mapping[str, Any],
        tokens: int | None,
        minutes: float | None,
        from_lens: bool = False,
    ) -> Wishes:
        """Return the wishes of the arguments of `train`, whose budget replaces that of `config`."""
        config, minutes = budget_in_minutes(config, tokens, minutes)
        return cls(recipe, config, settings if tokens is None else {**settings, "tokens": tokens}, minutes, from_lens)

    def require_valid(self) -> None:
        """Check all that can be checked without the model (InvalidValueError)."""
        self.resolved()

    def resolved(self, model: LanguageModel | None = None, **changed: Any) -> tuple[str | None, TrainingConfig]:
        """Return the name of the recipe and the settings, for a model if there is one. `changed` settings replace the caller's."""
        of_model = () if model is None else (model.default_sequence_length, model.unembed.hidden_dim)
        return resolve(self.recipe, self.config, {**self.settings, **changed}, *of_model, from_lens=self.from_lens)


@dataclass(frozen=True)
class TextOptions:
    """How the text is read; `field` to `cache_dir` as in `open_corpus`.

    Attributes:
        prefix: ids that belong before every sequence.
        keep_prefix: keep the prefix of a Corpus that the caller made.
    """

    field: str
    split: str
    join: Literal["eos", "packed"]
    max_tokens: int | None
    cache_dir: str | Path | None
    prefix: tuple[int, ...]
    keep_prefix: bool = False


@dataclass(frozen=True)
class Settled:
    """What a run does.

    Attributes:
        recipe: name of the recipe, or None.
        config: the settings.
        corpus: the text, which is long enough.
    """

    recipe: str | None
    config: TrainingConfig
    corpus: Corpus


def settle(
    wishes: Wishes, model: LanguageModel, inputs: Corpus | list[Source], text: TextOptions, group: Group, resumed: Path | None, show_progress: bool
) -> Settled:
    """Return the settings and the text of a run.

    Args:
        wishes: settings of the caller.
        model: the model.
        inputs: the text, see `read_inputs`.
        text: how it is read.
        group: processes of the run.
        resumed: folder of checkpoints of the run that is resumed. None = it is a new run.
        show_progress: show a progress bar while text is tokenized.

    Raises:
        NotEnoughDataError: if the text is too short for the run and must not repeat; names settings that would fit.
        InvalidValueError: for settings or token ids that do not fit the model.
    """
    budget = {} if wishes.minutes is None else _budget_of_minutes(wishes, model, group, resumed)
    recipe, config = wishes.resolved(model, **budget)
    if resumed is not None:  # the lens remembers what the run did, not what this version would do
        config = with_older_defaults(config, resumed, group)
    model.source.require_length(config.max_seq_len)
    corpus = inputs if isinstance(inputs, Corpus) else _tokenized(inputs, model, config, text, show_progress)
    _require_mask(corpus, config)
    if resumed is None and wishes.minutes is not None and corpus.counted is not None:  # the tokens between those that count take time too
        share = corpus.counted_tokens / corpus.tokens
        budget = _budget_of_minutes(wishes, model, group, resumed, share)
        config = wishes.resolved(model, **budget)[1]
    if not text.keep_prefix:
        corpus = corpus.with_prefix(text.prefix)
    model.check_ids(np.asarray([corpus.ids.max(), *corpus.prefix], np.int64))  # MLX would read other memory for an unknown id

    def with_budget(tokens: int) -> TrainingConfig:
        return wishes.resolved(model, **{**budget, "tokens": tokens})[1]

    if wishes.minutes is not None and not config.repeat and not suffices(corpus, config):
        config = with_budget(budget_that_fits(corpus, config.max_seq_len, with_budget))
    require_enough(corpus, config, with_budget)
    return Settled(recipe, config, corpus)


def _require_mask(corpus: Corpus, config: TrainingConfig) -> None:
    """Check that the text says which tokens count, if not all do (InvalidValueError), and only then: the lens remembers what it was trained on."""
    if config.loss_on == "answers" and corpus.counted is None:
        raise InvalidValueError(
            "loss_on='answers' needs to know the answers, and token ids have none. Give conversations, or Corpus.from_ids(ids, answers=mask)."
        )
    if config.loss_on == "all" and corpus.counted is not None:
        raise InvalidValueError("The Corpus has answers, and loss_on='all' counts all tokens. Give loss_on='answers', or a Corpus without a mask.")


def _budget_of_minutes(wishes: Wishes, model: LanguageModel, group: Group, resumed: Path | None, share: float = 1.0) -> dict[str, Any]:
    """Return the budget of a run in tokens, the same in all processes: that of the run that is resumed, or what fits into the minutes.

    `share` is the part of the tokens that count.
    """
    record = None if resumed is None else config_of_newest(resumed)
    if record is not None:
        return {name: record[name] for name in ("num_steps", "tokens_per_step", "warm_start_tokens", "max_seq_len")}
    found = 0
    if group.writes and wishes.minutes is not None:
        facts = facts_of_model(model)
        facts = facts if model.sharding is None else facts.of_process(group.size)
        speed = measured_speed(facts)
        found = budget_in(
            60 * wishes.minutes,
            lambda n: wishes.resolved(model, tokens=n)[1],
            lambda changed: seconds_of(facts, changed, speed, processes=group.size if group.parallel == "data" else 1, share=share),
        )
    return {"tokens": int(group.gather_json(found)[0])}


def _tokenized(sources: list[Source], model: LanguageModel, config: TrainingConfig, text: TextOptions, show: bool) -> Corpus:
    """Return the tokens of a text, with a progress bar while it is tokenized; tokens from the cache need none."""
    if model.tokenizer is None:
        raise InvalidValueError(NO_TOKENIZER)
    most = text.max_tokens
    if most is None and any(isinstance(source, HubDataset) for source in sources):
        most = tokens_to_read(config)
    with contextlib.ExitStack() as stack:
        bars: list[PhaseBar] = []

        def progress(tokens: int) -> None:
            if not bars:
                bars.append(stack.enter_context(PhaseBar(show)))
                bars[0].start("tokenizing", most or 0)
            bars[0].advance(tokens)

        return open_corpus(
            sources,
            model.tokenizer,
            field=text.field,
            split=text.split,
            join=text.join,
            max_tokens=most,
            loss_on=config.loss_on,
            cache_dir=text.cache_dir,
            progress=progress,
        )
