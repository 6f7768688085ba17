"""The one way to train a lens: from a model and a text to a lens that remembers both, with checkpoints on the way.

The command line, the demo, the benchmarks and mlxterp's `train_tuned_lens` all call `train`.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metalens.lenses.lens import TunedLens
from metalens.lenses.lens_file import lens_files, lens_outputs
from metalens.lenses.provenance import provenance_of
from metalens.lenses.translators import parameters_of
from metalens.models.capture import ResidualCapture
from metalens.models.facts import facts_of_model
from metalens.models.language_model import LanguageModel
from metalens.models.tokenization import NO_TOKENIZER
from metalens.training.callbacks import Callback, Progress
from metalens.training.checkpoint import LOCK, CheckpointFolder, config_of_newest, default_folder, mark_finished, numbers_of_newest, prepare_folder
from metalens.training.config import TrainingConfig
from metalens.training.data import Corpus, TrainingData, open_corpus, read_inputs
from metalens.training.data.hub import HubDataset
from metalens.training.data.readers import FileSource, Source
from metalens.training.distributed import Group
from metalens.training.loop import train_loop
from metalens.training.settings import resolve
from metalens.training.speed import budget_in, measured_speed, require_minutes, seconds_of
from metalens.training.sufficiency import budget_that_fits, require_enough, suffices, tokens_to_read
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import require_writable
from metalens.utils.lock import locked
from metalens.utils.outputs import require_replaceable
from metalens.utils.progress_bar import PhaseBar

P = ParamSpec("P")


class TrainingDivergedError(InvalidValueError):
    """A run gave no lens: every step was skipped, or the lens is not finite."""


def _old_call_too(function: Callable[P, TunedLens]) -> Callable[P, TunedLens]:
    """Send calls of version 0.1.0, `train(source, unembed, data, config, ...)`, to `train_loop`."""

    @functools.wraps(function)
    def train(*args: P.args, **kwargs: P.kwargs) -> TunedLens:
        if not isinstance(args[0] if args else kwargs.get("source"), ResidualCapture):
            return function(*args, **kwargs)
        warnings.warn(
            "train(source, unembed, data, config) is now metalens.training.train_loop, and metalens.train(model, data) is the usual way to train. "
            "The old call will be removed in the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        options: dict[str, Any] = dict(kwargs)
        on_step = options.pop("callback", None)
        options["callbacks"] = [*options.get("callbacks", ()), *([] if on_step is None else [on_step])]
        return cast("Callable[..., TunedLens]", train_loop)(*args, **options)

    return train


@_old_call_too
def train(
    model: LanguageModel | nn.Module | str | Path,
    data: TrainingData,
    *,
    recipe: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_dir: str | Path | CheckpointFolder | None = None,
    callbacks: Sequence[Callback | Callable[[Progress], Any]] = (),
    group: Group | None = None,
    config: TrainingConfig | Mapping[str, Any] | str | Path | None = None,
    field: str = "text",
    split: str = "train",
    join: Literal["eos", "packed"] = "eos",
    max_tokens: int | None = None,
    bos: bool = True,
    cache_dir: str | Path | None = None,
    checkpoint_every: int | None = 50,
    stop: Callable[[], bool] | None = None,
    show_progress: bool = False,
    force: bool = False,
    tokens: int | None = None,
    minutes: float | None = None,
    **settings: Any,
) -> TunedLens:
    """Train a lens for a model on a text.

    `settings` are those of `TrainingConfig` (num_steps=..., learning_rate=..., ...). They replace those of `config`, which replace the recipe's.
    Everything that can be wrong with the arguments is found before the model is loaded.

    Args:
        model: a LanguageModel (an InterpretableModel is one), or a name: a folder, a hub id, or 'demo' for the bundled model.
        data: the training text. A string names a file, a folder or, with 'hf:' before it, a data set of the Hugging Face hub
            ('hf:owner/name:configuration@revision'); a Path names a file or folder. A list holds such names, or texts, each a document: a text has
            a space or a line break in it. Token ids are a list, an array, or a list of these. A Corpus is taken as it is.
            `metalens.training.data.read_inputs` has the rules in full: a mistyped name is an error, not a text.
        recipe: name of a recipe, see `metalens.training.RECIPES`. None = the one that `config` names, else 'fast'.
        out: path of the lens: OUT.npz and OUT.json are written. None = only return the lens.
        resume: go on from the newest checkpoint, if there is one.
        checkpoint_dir: folder for checkpoints. None = OUT.checkpoints, or without `out` no checkpoints.
        callbacks: receivers of the run's events: a Callback is called in rank 0 alone, a function of a Progress after every step in every process.
        group: the processes of the run, see `Group.from_environment`, each of which must make the same call. None = this process alone.
        config: settings as a JSON or TOML file (examples/train.toml has all of them), a dict, or a complete TrainingConfig.
        field: field of JSON Lines, or column of tables, with the text.
        split: split of hub data sets.
        join: how documents follow each other: 'eos' puts the EOS token between them; with 'packed' no sequence crosses the end of a document.
        max_tokens: number of tokens after which reading stops. None = all of the text; of hub data sets, the tokens that the run needs.
        bos: put the tokens that the tokenizer puts before a text, often a beginning-of-sequence token, before every sequence, whatever the form of
            the data. A Corpus has its own prefix. False = no sequence begins with them.
        cache_dir: folder for tokens. None = $METALENS_CACHE, else ~/.cache/metalens/tokens.
        checkpoint_every: steps between checkpoints. None = write no checkpoints.
        stop: function that is called within and after every step. True writes a checkpoint and ends the run within about a second: see
            `metalens.training.interruptible` for Ctrl-C, and `train_loop`.
        show_progress: show progress bars on stderr, one for each phase: tokenizing, warm start, training.
        force: replace files of the names of `out` that are not a lens.
        tokens: budget: tokens of the text in all, which the recipe divides between the warm start, the number of steps and the tokens of a step
            (`metalens.training.budget` has the rules). Settings that are given stay, as far as the tokens reach. None = no budget.
        minutes: budget in minutes on this machine instead: the tokens that a probe of about a second expects to take so long, at most those of the
            text. A resumed run keeps the tokens of its first start. None = no budget.
        settings: settings of TrainingConfig.

    Returns:
        the lens, which remembers the model, the recipe, the settings and the text. If the processes divide the layers, only rank 0 has all of them.

    Raises:
        NotEnoughDataError: if the text is too short for the run and must not repeat; names settings that would fit.
        UnfinishedRunError: if the checkpoints of a run that has not finished are in the way.
        TrainingInterruptedError: when `stop` returned True.
        TrainingDivergedError: if every step was skipped, or the lens is not finite; an older lens at `out` stays.
        NotOursError: if a file of the name of `out` is not a lens.
        LockedError: if another run writes to `out` or to the checkpoints.
        InvalidValueError, InvalidTypeError: for wrong settings, data or models, for sequences longer than the model's table of positions, and for a
            checkpoint of another run.
        GroupLostError: if another process of the group has ended.
        OSError: if a file can't be read or written.
    """
    settings |= {} if tokens is None else {"tokens": tokens}
    if minutes is not None:
        require_minutes(minutes, tokens)
    resolve(recipe, config, settings)
    inputs = read_inputs(data, field=field, split=split)
    group = group or Group()
    folder = _checkpoint_folder(out, checkpoint_dir, checkpoint_every)
    if resume and folder is None:
        raise InvalidValueError("resume=True needs the checkpoints of the run: give its out or its checkpoint_dir, and checkpoint_every.")
    with contextlib.ExitStack() as locks:
        with group.together():
            if group.writes:
                _claim(locks, out, folder, [*_files_of(inputs), *([config] if isinstance(config, (str, Path)) else [])], resume, force)
        model = model if isinstance(model, LanguageModel) else LanguageModel(model)
        context = model.default_sequence_length
        if minutes is not None:
            settings |= _budget_of_minutes(minutes, model, recipe, config, settings, group, folder if resume else None)
        name, settled = resolve(recipe, config, settings, context)
        model.source.require_length(settled.max_seq_len)
        how = {"field": field, "split": split, "join": join, "max_tokens": max_tokens, "cache_dir": cache_dir}
        corpus = inputs if isinstance(inputs, Corpus) else _tokenized(inputs, model, settled, how, show_progress and group.writes)
        if not bos or inputs is not data:  # a Corpus of the caller's has its own prefix
            corpus = corpus.with_prefix(model.prefix if bos else ())
        model.check_ids(np.asarray([corpus.ids.max(), *corpus.prefix], np.int64))  # MLX would read other memory for an unknown id

        def with_budget(budget: int) -> TrainingConfig:
            return resolve(recipe, config, settings | {"tokens": budget}, context)[1]

        if minutes is not None and not settled.repeat and not suffices(corpus, settled):
            settled = with_budget(budget_that_fits(corpus, settled.max_seq_len, with_budget))
        require_enough(corpus, settled, with_budget)
        steps: list[Progress] = []
        checkpoints = None
        if folder is not None:
            checkpoints = checkpoint_dir if isinstance(checkpoint_dir, CheckpointFolder) else CheckpointFolder(folder)
        lens = train_loop(
            model.source,
            model.unembed,
            corpus,
            settled,
            callbacks=[*callbacks, lambda progress: steps.__setitem__(slice(None), [progress])],
            checkpoints=checkpoints,
            checkpoint_every=checkpoint_every,
            resume=resume,
            group=group,
            stop=stop or (lambda: False),
            show_progress=show_progress,
        )
        newest = numbers_of_newest(folder) if folder is not None and not steps else {}
        seen, skipped = (steps[-1].tokens, steps[-1].skipped) if steps else (newest.get("tokens"), newest.get("skipped", 0))
        passes = len(group.passes(lens.layers, settled.layers_at_once))
        _require_result(lens, skipped, passes * settled.num_steps)
        _remember(lens, model, name, settled, corpus, None if seen is None else seen // passes, skipped)
        if group.writes:
            if out is not None:
                lens.save(out, force=force)
            if folder is not None:
                mark_finished(folder)
        return lens


def _files_of(inputs: Corpus | list[Source]) -> list[Path]:
    """Return the files that a run reads its text from."""
    return [] if isinstance(inputs, Corpus) else [source.path for source in inputs if isinstance(source, FileSource)]


def _claim(locks: contextlib.ExitStack, out: str | Path | None, folder: Path | None, inputs: Sequence[str | Path], resume: bool, force: bool) -> None:
    """Check that a run may write its results, and keep other runs from writing there while `locks` is open."""
    if out is not None:
        for file in lens_files(out):
            require_writable(file)
        require_replaceable(lens_outputs(out), force=force, inputs=inputs)
        weights = lens_files(out)[0]
        locks.enter_context(locked(weights.with_name(f".{weights.name}{LOCK}"), str(out)))
    if folder is not None:
        require_writable(folder / LOCK)
        locks.enter_context(locked(folder / LOCK, str(folder)))
        prepare_folder(folder, resume)


def _require_result(lens: TunedLens, skipped: int, steps: int) -> None:
    """Check that a run has trained a lens (TrainingDivergedError)."""
    remedy = (
        "Nothing is written, and an older lens stays as it was. Lower the learning rate. "
        "If the model is float16, its activations may overflow: convert it to bfloat16 (mlx_lm.convert --dtype bfloat16)."
    )
    if steps and skipped >= steps:
        raise TrainingDivergedError(f"The training has failed: the loss or the gradient of all {steps} steps was not finite. {remedy}")
    spoiled = [layer for layer in lens.layers if not all(map(_is_finite, parameters_of(lens.translators[layer]).values()))]
    if spoiled:
        raise TrainingDivergedError(f"The training has diverged: the translators of layers {spoiled} hold NaN or infinity. {remedy}")


def _is_finite(array: mx.array) -> bool:
    return bool(mx.all(mx.isfinite(array)).item())


def _budget_of_minutes(
    minutes: float,
    model: LanguageModel,
    recipe: str | None,
    config: TrainingConfig | Mapping[str, Any] | str | Path | None,
    settings: Mapping[str, Any],
    group: Group,
    resumed: Path | None,
) -> dict[str, Any]:
    """Return the budget of a run in tokens, the same in all processes: that of the run that is resumed, or what fits into the minutes."""
    record = None if resumed is None else config_of_newest(resumed)
    if record is not None:
        return {name: record[name] for name in ("num_steps", "tokens_per_step", "warm_start_tokens", "max_seq_len")}
    found = 0
    if group.writes:
        facts = facts_of_model(model)
        speed = measured_speed(facts)
        found = budget_in(
            60 * minutes,
            lambda n: resolve(recipe, config, {**settings, "tokens": n}, model.default_sequence_length)[1],
            lambda changed: seconds_of(facts, changed, speed, processes=group.size if group.parallel == "data" else 1),
        )
    return {"tokens": int(group.gather_json(found)[0])}


def _checkpoint_folder(out: str | Path | None, given: str | Path | CheckpointFolder | None, every: int | None) -> Path | None:
    """Return the folder for the checkpoints of a run, None if it writes none."""
    if every is None:
        return None
    if isinstance(given, CheckpointFolder):
        return given.path
    if given is not None:
        return Path(given)
    return None if out is None else default_folder(lens_files(out)[0])


def _tokenized(sources: list[Source], model: LanguageModel, config: TrainingConfig, how: Mapping[str, Any], show: bool) -> Corpus:
    """Return the tokens of a text, with a progress bar while it is tokenized; tokens from the cache need none."""
    if model.tokenizer is None:
        raise InvalidValueError(NO_TOKENIZER)
    how = dict(how)
    if how["max_tokens"] is None and any(isinstance(source, HubDataset) for source in sources):
        how["max_tokens"] = tokens_to_read(config)
    with contextlib.ExitStack() as stack:
        bars: list[PhaseBar] = []

        def progress(tokens: int) -> None:
            if not bars:
                bars.append(stack.enter_context(PhaseBar(show)))
                bars[0].start("tokenizing", how["max_tokens"] or 0)
            bars[0].advance(tokens)

        return open_corpus(sources, model.tokenizer, progress=progress, **how)


def _remember(
    lens: TunedLens, model: LanguageModel, recipe: str | None, config: TrainingConfig, corpus: Corpus, tokens: int | None, skipped: int
) -> None:
    """Write into a lens which model, recipe, settings and text it was trained with, and how many steps were skipped.

    `tokens` are those that each layer has seen.
    """
    training = {**config.to_dict(), "data": corpus.identity()}
    if math.isinf(config.gradient_clip):
        training["gradient_clip"] = "inf"  # JSON has no infinity
    if skipped:
        training["skipped_steps"] = skipped
    facts: dict[str, Any] = {"weights": model.weights_hash, "tokens": tokens, "recipe": recipe, "training": training}
    lens.provenance = {**lens.provenance, **provenance_of(model.unembed, model.name, **facts)}
