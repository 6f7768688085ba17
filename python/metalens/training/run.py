"""The one way to train a lens: from a model and a text to a lens that remembers both, with checkpoints on the way.

The command line, the demo, the benchmarks and mlxterp's `train_tuned_lens` all call `train`.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, cast

import mlx.nn as nn

from metalens.lenses.lens import TunedLens
from metalens.models.capture import ResidualCapture
from metalens.models.language_model import LanguageModel
from metalens.training.callbacks import Callback, Progress
from metalens.training.checkpoint import CheckpointFolder
from metalens.training.config import TrainingConfig
from metalens.training.data import TrainingData, read_inputs
from metalens.training.distributed import Group, group_of, require_divisible
from metalens.training.loop import train_loop
from metalens.training.outputs import RunOutputs
from metalens.training.result import TrainingDivergedError, remember, require_result
from metalens.training.settle import TextOptions, Wishes, settle
from metalens.training.start import lens_to_start_from
from metalens.utils.errors import InvalidValueError

__all__ = ["TrainingDivergedError", "train"]

P = ParamSpec("P")


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
    start_from: TunedLens | str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_dir: str | Path | CheckpointFolder | None = None,
    callbacks: Sequence[Callback | Callable[[Progress], Any]] = (),
    group: Group | None = None,
    shard_model: bool = False,
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
        start_from: a TunedLens, or the path of one, whose training goes on: after more text, for a fine-tuned model, for some layers. There is no
            warm start then, which would replace it, and layers that the run does not train keep its translators. None = the warm start of the
            recipe, or the identity.
        out: path of the lens: OUT.npz and OUT.json are written. None = only return the lens.
        resume: go on from the newest checkpoint, if there is one.
        checkpoint_dir: folder for checkpoints. None = OUT.checkpoints, or without `out` no checkpoints.
        callbacks: receivers of the run's events: a Callback is called in rank 0 alone, a function of a Progress after every step in every process.
        group: the processes of the run, see `Group.from_environment`, each of which must make the same call. None = those that hold the model, or
            this process alone.
        shard_model: divide the model among the processes of `group` (tensor parallelism), which then divide the layers, Group('layers', ...). Needs
            the name of a model; `metalens.load(name, tensor_group=group)` does the same.
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
        tokens: budget: tokens of the text in all, which the recipe divides between the guard, the warm start, the number of steps and the tokens of a
            step (`metalens.training.budget` has the rules). Settings that are given stay, as far as the tokens reach. None = no budget.
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
    wishes = Wishes.of(recipe, config, settings, tokens, minutes, start_from is not None)
    wishes.require_valid()
    inputs = read_inputs(data, field=field, split=split)
    if shard_model:
        require_divisible(model, group)
    group = group_of(model.source if isinstance(model, LanguageModel) else None, group)
    outputs = RunOutputs.of(out, checkpoint_dir, checkpoint_every)
    if resume and outputs.folder is None:
        raise InvalidValueError("resume=True needs the checkpoints of the run: give its out or its checkpoint_dir, and checkpoint_every.")
    with contextlib.ExitStack() as locks:
        with group.together():
            if group.writes:
                outputs.claim(locks, inputs, config, start_from, resume, force)
        start = lens_to_start_from(start_from, group)
        model = model if isinstance(model, LanguageModel) else LanguageModel(model, tensor_group=group if shard_model else None)
        text = TextOptions(field, split, join, max_tokens, cache_dir, model.prefix if bos else (), keep_prefix=bos and inputs is data)
        settled = settle(wishes, model, inputs, text, group, outputs.folder if resume else None, show_progress and group.writes)
        steps: list[Progress] = []
        lens = train_loop(
            model.source,
            model.unembed,
            settled.corpus,
            settled.config,
            callbacks=[*callbacks, lambda progress: steps.__setitem__(slice(None), [progress])],
            checkpoints=outputs.checkpoints(),
            checkpoint_every=checkpoint_every,
            resume=resume,
            group=group,
            start=start,
            stop=stop or (lambda: False),
            show_progress=show_progress,
        )
        passes = len(group.passes(settled.config.trained_layers(model.num_layers), settled.config.layers_at_once))
        seen, skipped = (steps[-1].tokens, steps[-1].skipped) if steps else outputs.numbers_of_newest()
        require_result(lens, skipped, passes * settled.config.num_steps)
        remember(lens, model, settled, None if seen is None else seen // passes, skipped, None if start is None else start.facts)
        if group.writes:
            outputs.write(lens, force)
        return lens
