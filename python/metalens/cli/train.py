"""metalens train."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import click

from metalens.cli.common import (
    FilePath,
    SeveralFiles,
    bos_option,
    data_options,
    force_option,
    note,
    one_clear_error,
    parallel_of,
    parallel_option,
    sources_of,
    start_option,
)
from metalens.cli.settings import given_settings, in_options, training_options
from metalens.lenses.lens_file import lens_files
from metalens.training import (
    Callback,
    Group,
    MetricsFile,
    NotEnoughDataError,
    Progress,
    TensorBoard,
    TrainingConfig,
    TrainingInterruptedError,
    UnfinishedRunError,
    WandB,
    interruptible,
    train,
)
from metalens.training.callbacks import metrics_output
from metalens.training.checkpoint import default_folder
from metalens.training.interrupt import INTERRUPTED
from metalens.utils.errors import InvalidValueError, MetalensError
from metalens.utils.files import require_writable
from metalens.utils.outputs import require_replaceable


def what_it_takes(model: str, recipe: str | None, config: TrainingConfig, group: Group, shard_model: bool) -> str:
    """Say in a line what a run takes whose model is loaded, and if that is more than an hour, which budget takes ten minutes.

    "" = the model's shape is not known.
    """
    from metalens.display.format import duration, gigabytes
    from metalens.estimate.memory import plan

    try:
        found = plan(model, recipe, config=config, measure=True, processes=group.size, parallel=group.parallel, shard_model=shard_model)
    except (MetalensError, OSError):
        return ""
    assert found.duration is not None
    more = "" if found.share_known else ", and more for the text between the answers"
    time = duration(found.duration.total - found.duration.start)
    tokens, memory = config.total_tokens * found.passes, gigabytes(found.total)
    line = f"The run takes about {tokens:,} tokens, {time} on this machine{more}, {memory} of memory."
    return line if found.short_budget is None else f"{line} --tokens {found.short_budget} would take ten minutes."


class Notes(Callback):
    """Says on stderr what a run takes, or where a resumed run goes on, and whether a step was left to do.

    Args:
        model, recipe, shard_model: arguments of the command.
        group: processes of the run.

    Attributes:
        steps: number of steps of this process.
        first_step: number of the first step that was left to do.
    """

    def __init__(self, model: str, recipe: str | None, group: Group, shard_model: bool) -> None:
        self.model, self.recipe, self.group, self.shard_model = model, recipe, group, shard_model
        self.steps = self.first_step = 0

    def on_start(self, config: TrainingConfig, first_step: int) -> None:
        """Say what a run takes, or where a resumed one goes on."""
        self.first_step = first_step
        if first_step:
            note(f"Going on after step {first_step}.")
        elif line := what_it_takes(self.model, self.recipe, config, self.group, self.shard_model):
            note(line)

    def on_step(self, progress: Progress) -> None:
        """Count the steps."""
        self.steps += 1


@click.command("train", cls=SeveralFiles)
@click.argument("model")
@data_options(required=True)
@click.option(
    "--join",
    type=click.Choice(["eos", "packed"]),
    default="eos",
    show_default=True,
    help="How documents follow each other: with the EOS token between them, or so that no sequence crosses the end of a document.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help="Tokens after which reading stops.  [default: all tokens of files, the tokens that the run needs of hub data sets]",
)
@bos_option
@click.option("--cache-dir", type=FilePath(file_okay=False), help="Folder for tokens.  [default: ~/.cache/metalens/tokens]")
@click.option("--out", required=True, type=FilePath(), help="Path of the lens: OUT.npz and OUT.json are written.")
@start_option
@training_options
@click.option("--checkpoint-dir", type=FilePath(file_okay=False), help="Folder for checkpoints.  [default: OUT.checkpoints]")
@click.option("--checkpoint-every", default=50, show_default=True, type=click.IntRange(min=1), help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint, if there is one.")
@click.option("--metrics", type=FilePath(dir_okay=False), metavar="FILE.jsonl", help="File for one line of JSON per step.")
@click.option("--wandb", metavar="PROJECT", help="Project of Weights & Biases to report to; needs wandb.")
@click.option("--tensorboard", type=FilePath(file_okay=False), help="Folder for events of TensorBoard; needs tensorboardX.")
@parallel_option
@force_option
@one_clear_error
def train_command(
    model: str,
    data: tuple[str, ...],
    field: str,
    split: str,
    join: Literal["eos", "packed"],
    max_tokens: int | None,
    no_bos: bool,
    cache_dir: Path | None,
    out: Path,
    start_from: Path | None,
    recipe: str | None,
    config_file: Path | None,
    checkpoint_dir: Path | None,
    checkpoint_every: int,
    resume: bool,
    metrics: Path | None,
    wandb: str | None,
    tensorboard: Path | None,
    parallel: Literal["data", "layers"] | None,
    shard_model: bool,
    force: bool,
    **options: Any,
) -> None:
    """Train a tuned lens for MODEL.

    Ctrl-C ends the run within about a second with a checkpoint, also in the warm start, and --resume goes on from there.
    """
    files = lens_files(out)
    folder = checkpoint_dir or default_folder(files[0])
    group = Group.from_environment(parallel_of(parallel, shard_model))
    notes, callbacks = Notes(model, recipe, group, shard_model), []
    with group.together():
        if group.writes:
            if metrics is not None:
                if metrics.absolute() in {file.absolute() for file in files}:
                    raise InvalidValueError(f"{metrics} is a file of the lens (--out). Give another path for --metrics.")
                require_replaceable([metrics_output(metrics)], force=force, inputs=[*data, *([] if config_file is None else [config_file])])
            callbacks = [notes, *_reporters(metrics, wandb, tensorboard, folder, force)]
    try:
        with interruptible() as stop:
            train(
                model,
                sources_of(data),
                recipe=recipe,
                start_from=start_from,
                out=out,
                resume=resume,
                checkpoint_dir=folder,
                callbacks=callbacks,
                group=group,
                shard_model=shard_model,
                config=config_file,
                field=field,
                split=split,
                join=join,
                max_tokens=max_tokens,
                bos=not no_bos,
                cache_dir=cache_dir,
                checkpoint_every=checkpoint_every,
                stop=stop,
                show_progress=True,
                force=force,
                **given_settings(options),
            )
    except NotEnoughDataError as error:
        raise _in_words_of_the_command(error) from error
    except UnfinishedRunError as error:
        raise UnfinishedRunError(error.folder, "go on with --resume, remove the folder, or give another --checkpoint-dir.") from error
    except TrainingInterruptedError as interruption:
        if group.writes:
            kept = f"What it has learned is in {folder}. " if interruption.learned else "There is nothing to keep yet. "
            note(f"{interruption} {kept}Go on with the same command and --resume.")
        sys.exit(INTERRUPTED)
    if group.writes:
        if notes.first_step and not notes.steps:
            note("This run had finished: no step was left to do.")
        note(f"Lens written to {files[0]} and {files[1].name}.")


def _in_words_of_the_command(error: NotEnoughDataError) -> NotEnoughDataError:
    """Return the error with options in place of settings."""
    if not error.changes:
        return error
    options = "; ".join(in_options(change) for change in error.changes)
    return NotEnoughDataError(error.shortage, error.changes, f"Give more text, or one of: {options}.")


def _reporters(metrics: Path | None, wandb: str | None, tensorboard: Path | None, checkpoints: Path, force: bool) -> list[Callback]:
    """Return the callbacks that were asked for (MissingPackageError, OSError)."""
    found: list[Callback] = []
    if metrics is not None:
        require_writable(metrics)
        found.append(MetricsFile(metrics, force=force))
    if wandb is not None:
        found.append(WandB(wandb, run_file=checkpoints / "wandb-run"))
    if tensorboard is not None:
        require_writable(tensorboard / "events")
        found.append(TensorBoard(tensorboard))
    return found
