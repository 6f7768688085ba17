"""metalens train and plan."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

from metalens.cli.common import SeveralFiles, load_model, note, one_clear_error, print_json, print_table, sources_of
from metalens.cli.settings import config_of, training_options
from metalens.display import tables as report
from metalens.estimate import memory as planning
from metalens.lenses.lens_file import lens_files
from metalens.lenses.provenance import provenance_of
from metalens.models.bundled import path_of
from metalens.models.facts import facts_of
from metalens.training import (
    CheckpointFolder,
    Corpus,
    Group,
    Listener,
    MetricsFile,
    NotEnoughDataError,
    Sampler,
    TensorBoard,
    TrainingConfig,
    TrainingInterruptedError,
    WandB,
    open_corpus,
    train,
)
from metalens.training.data import find_sources
from metalens.training.data.hub import HubDataset
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import require_writable
from metalens.utils.progress_bar import token_bar

FINISHED = "finished"  # a file beside the checkpoints of a run that reached its end
INTERRUPTED = 130  # exit code: 128 + SIGINT, as shells have it


class Watch(Listener):
    """What the command has to know of a run.

    Attributes:
        first_step: that was left to do.
        tokens: seen, None if no step was left.
    """

    def __init__(self) -> None:
        self.first_step = 0
        self.tokens: int | None = None

    def on_start(self, config: TrainingConfig, first_step: int) -> None:
        """Say where a resumed run goes on."""
        self.first_step = first_step
        if first_step:
            note(f"Going on after step {first_step}.")

    def on_step(self, progress: Any) -> None:
        """Count."""
        self.tokens = progress.tokens


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, a first Ctrl-C is noted, for the run to end after its step; a second one ends the process at once: no file is ever half written.

    A thread listens, because Python's own handlers wait until an evaluation of MLX has ended.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are somebody else's
        yield lambda: False
        return
    asked = threading.Event()
    listening, signalled = os.pipe()
    os.set_blocking(signalled, False)

    def listen() -> None:
        while received := os.read(listening, 1):
            if received[0] != signal.SIGINT:
                continue
            if asked.is_set():
                os._exit(INTERRUPTED)
            asked.set()
            with contextlib.suppress(OSError):
                os.write(2, b"\nStopping after this step. Press Ctrl-C again to end at once.\n")
        os.close(listening)

    threading.Thread(target=listen, name="metalens-interrupts", daemon=True).start()
    before = signal.signal(signal.SIGINT, lambda *_: None), signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    try:
        yield asked.is_set
    finally:
        signal.set_wakeup_fd(before[1])
        signal.signal(signal.SIGINT, before[0])
        os.close(signalled)


# ------------------------------------------------------------------ is there enough text?


def suffices(corpus: Corpus, config: TrainingConfig) -> bool:
    """Whether a pass of the run can be made on this text without repeating it."""
    sampler = Sampler(corpus, config.max_seq_len, seed=config.seed)
    try:
        if config.warm_start_tokens:
            sampler.take_step(config.warm_start_tokens)
        sampler.require(config.step_tokens, config.num_steps)
    except NotEnoughDataError:
        return False
    return True


def largest(limit: int, good: Callable[[int], bool]) -> int:
    """The largest number up to a limit that is good, if all below it are; 0 if 1 is not."""
    least, most = 0, limit
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if good(middle) else (least, middle - 1)
    return least


def what_would_fit(corpus: Corpus, config: TrainingConfig) -> list[str]:
    """Options with which the text would do, the least changes first."""
    found = []
    if steps := largest(config.num_steps, lambda n: suffices(corpus, replace(config, num_steps=n))):
        found.append(f"--steps {steps}")
    length = config.max_seq_len
    if count := largest(config.sequences_per_step, lambda n: suffices(corpus, replace(config, tokens_per_step=n * length))):
        found.append(f"--tokens-per-step {count * length}")
    if found or not config.warm_start_tokens:
        return found
    fewer = max(corpus.tokens // 2, 1)
    return (
        [f"--warm-start-tokens {fewer} {option}" for option in what_would_fit(corpus, replace(config, warm_start_tokens=fewer))[:1]]
        if (fewer < config.warm_start_tokens)
        else []
    )


def require_enough(corpus: Corpus, config: TrainingConfig) -> None:
    """Find out before the training whether there is enough text.

    Raises:
        NotEnoughDataError: saying how much there is, how much is needed, and which options would fit.
    """
    if config.repeat or corpus.tokens < config.max_seq_len or suffices(corpus, config):
        return
    start = f"{config.warm_start_tokens} tokens of the warm start and " if config.warm_start_tokens else ""
    options = [*what_would_fit(corpus, config), "--repeat"]
    raise NotEnoughDataError(
        f"Not enough text: {start}{config.num_steps} steps of {config.step_tokens} tokens need {config.total_tokens} tokens, "
        f"the text has {Sampler(corpus, config.max_seq_len).total_tokens}. Give more text, or one of: {'; '.join(options)}."
    )


def tokens_to_read(config: TrainingConfig) -> int:
    """As many as a run can need: every step, and the warm start, may take up to a sequence more than it asks for."""
    return config.total_tokens + (config.num_steps + 1) * config.max_seq_len


# ------------------------------------------------------------------ checkpoints


def prepare_checkpoints(folder: Path, resume: bool) -> None:
    """Make room for a new run where an old one has finished.

    Raises:
        ValueError: if the old one has not.
        OSError: if the folder can't be written.
    """
    require_writable(folder / FINISHED)
    if resume:
        return
    old = [*folder.glob("step-*"), *folder.glob("rank-*-of-*")]
    if old and not (folder / FINISHED).exists():
        raise InvalidValueError(
            f"{folder} has checkpoints of a run that has not finished: go on with --resume, remove the folder, or give another --checkpoint-dir."
        )
    for part in old:
        shutil.rmtree(part, ignore_errors=True)
    (folder / FINISHED).unlink(missing_ok=True)


def tokens_of_newest(folder: Path) -> int | None:
    """Tokens seen up to the newest checkpoint."""
    records = sorted(folder.glob("**/step-*/state.json"), key=lambda path: path.parent.name)
    return int(json.loads(records[-1].read_text())["tokens"]) if records else None


# ------------------------------------------------------------------ commands


def data_options(required: bool) -> Callable[[Any], Any]:
    """--data and how it is read."""

    def options(command: Any) -> Any:
        for option in (
            click.option("--split", default="train", show_default=True, help="Of hub data sets."),
            click.option("--field", default="text", show_default=True, help="Field or column with the text."),
            click.option(
                "--data",
                required=required,
                multiple=True,
                metavar="FILE...",
                help="UTF-8 text, JSON Lines or Parquet; folders of these; hf:DATASET[:CONFIGURATION][@REVISION].",
            ),
        ):
            command = option(command)
        return command

    return options


SHARE = click.option(
    "--share",
    type=click.Choice(["data", "layers"]),
    default="data",
    show_default=True,
    help="What the processes that mlx.launch starts divide among them.",
)


@click.command("train", cls=SeveralFiles)
@click.argument("model")
@data_options(required=True)
@click.option("--join", type=click.Choice(["eos", "packed"]), default="eos", show_default=True, help="Documents: one stream with EOS, or apart.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Read no more text.  [default: all of files, what is needed of the hub's]")
@click.option("--cache-dir", type=click.Path(file_okay=False, path_type=Path), help="For tokens.  [default: ~/.cache/metalens/tokens]")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Where the lens goes: OUT.npz and OUT.json.")
@training_options
@click.option("--checkpoint-dir", type=click.Path(file_okay=False, path_type=Path), help="[default: OUT.checkpoints]")
@click.option("--checkpoint-every", default=50, show_default=True, type=click.IntRange(min=1), help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint, if there is one.")
@click.option("--metrics", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.jsonl", help="A line of JSON for every step.")
@click.option("--wandb", metavar="PROJECT", help="Report to Weights & Biases; needs wandb.")
@click.option("--tensorboard", type=click.Path(file_okay=False, path_type=Path), help="A folder for events; needs tensorboardX.")
@SHARE
@one_clear_error
def train_command(
    model: str,
    data: tuple[str, ...],
    field: str,
    split: str,
    join: Literal["eos", "packed"],
    max_tokens: int | None,
    cache_dir: Path | None,
    out: Path,
    recipe: str | None,
    config_file: Path | None,
    checkpoint_dir: Path | None,
    checkpoint_every: int,
    resume: bool,
    metrics: Path | None,
    wandb: str | None,
    tensorboard: Path | None,
    share: Literal["data", "layers"],
    **options: Any,
) -> None:
    """Train a tuned lens for MODEL.

    Ctrl-C ends the run after its step with a checkpoint, and --resume goes on from there.
    """
    files = lens_files(out)
    folder = checkpoint_dir or files[0].with_name(files[0].stem + ".checkpoints")
    config_of(recipe, config_file, options)  # what is wrong with the settings is said before anything is loaded
    sources = sources_of(data)
    found = find_sources(sources, field=field, split=split)
    group = Group.from_environment(share)
    watch, listeners = Watch(), []
    with group.together():
        if group.writes:
            for file in [*files, *([] if metrics is None else [metrics])]:
                require_writable(file)
            prepare_checkpoints(folder, resume)
            listeners = [watch, *_listeners(metrics, wandb, tensorboard, folder)]
    loaded = load_model(model)
    name, config = config_of(recipe, config_file, options, loaded.default_sequence_length)
    if max_tokens is None and any(isinstance(source, HubDataset) for source in found):
        max_tokens = tokens_to_read(config)
    corpus = _read(sources, loaded.tokenizer, group.writes, field=field, join=join, cache_dir=cache_dir, split=split, max_tokens=max_tokens)
    loaded.check_ids(np.asarray([corpus.ids.max(), *corpus.prefix], np.int64))  # MLX would read other memory for an id that the model does not have
    require_enough(corpus, config)
    unembed = loaded.unembed
    try:
        with interruptible() as stop:
            lens = train(
                loaded.source,
                unembed,
                corpus,
                config,
                callbacks=listeners,
                checkpoints=CheckpointFolder(folder),
                checkpoint_every=checkpoint_every,
                resume=resume,
                group=group,
                stop=stop,
                show_progress=True,
            )
    except TrainingInterruptedError as interruption:
        if group.writes:
            note(f"{interruption} What it has learned is in {folder}. Go on with the same command and --resume.")
        sys.exit(INTERRUPTED)
    if not group.writes:
        return
    if watch.tokens is None and watch.first_step:
        note("This run had finished: no step was left to do.")
    tokens = watch.tokens if watch.tokens is not None else tokens_of_newest(folder)
    passes = len(group.passes(lens.layers, config.layers_at_once))
    training = {**config.to_dict(), "data": corpus.identity()}
    seen = None if tokens is None else tokens // passes
    lens.provenance = {**lens.provenance, **provenance_of(unembed, loaded.name, tokens=seen, recipe=name, training=training)}
    lens.save(out)
    (folder / FINISHED).touch()
    note(f"Lens written to {files[0]} and {files[1].name}.")


def _listeners(metrics: Path | None, wandb: str | None, tensorboard: Path | None, checkpoints: Path) -> list[Listener]:
    """Those that were asked for; ImportError for a package that is missing."""
    found: list[Listener] = [] if metrics is None else [MetricsFile(metrics)]
    if wandb is not None:
        found.append(WandB(wandb, run_file=checkpoints / "wandb-run"))
    if tensorboard is not None:
        require_writable(tensorboard / "events")
        found.append(TensorBoard(tensorboard))
    return found


def _read(sources: list[str | Path], tokenizer: Any, show: bool, **how: Any) -> Corpus:
    """The corpus, with a bar while it is tokenized; one from the cache needs none."""
    with contextlib.ExitStack() as stack:
        bars: list[Any] = []

        def progress(tokens: int) -> None:
            if not bars:
                bars.append(stack.enter_context(token_bar(how["max_tokens"] or 0, "tokenizing", show)))
            bars[0].update(tokens)

        return open_corpus(sources, tokenizer, progress=progress, **how)


@click.command("plan", cls=SeveralFiles)
@click.argument("model")
@data_options(required=False)
@training_options
@SHARE
@click.option("--processes", default=1, show_default=True, type=click.IntRange(min=1), help="That mlx.launch would start.")
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), metavar="GB", help="Of each process's machine.  [default: this one's]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@one_clear_error
def plan_command(
    model: str,
    data: tuple[str, ...],
    field: str,
    split: str,
    recipe: str | None,
    config_file: Path | None,
    share: Literal["data", "layers"],
    processes: int,
    memory: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what `train` with the same options would take: memory, work and text, and what to change if it does not fit. Loads no weights.

    MODEL is a folder with a config.json (weights make the numbers better), a hub id, 'demo', or one of Llama-3.2-1B-4bit, Llama-3.1-8B-4bit,
    Llama-3.1-70B-4bit.
    """
    facts = facts_of(path_of(model))
    name, config = config_of(recipe, config_file, options, facts.context)
    available = None if memory is None else round(memory * 1e9)
    text_bytes = planning.text_bytes(find_sources(sources_of(data), field=field, split=split)) if data else None
    found = planning.plan(facts, config, available=available, processes=processes, share=share, text_bytes=text_bytes)
    if as_json:
        print_json({"model": model, "recipe": name, **found.to_dict()})
        return
    print_table(report.plan_table(found, f"{model}, recipe {name}"))
    for line in found.remarks:
        note(line)
