"""The command line: metalens train | eval | lens | demo | roofline | doctor.

Results go to stdout, as a table or with --json as JSON alone; progress and notes go to stderr.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from metalens import demo as demonstration
from metalens import doctor as diagnosis
from metalens import report, roofline
from metalens.accelerate import accelerate
from metalens.arrays import nested
from metalens.evaluate import evaluate
from metalens.files import atomic_write, require_writable
from metalens.lens import TunedLens, lens_files
from metalens.model import InterpretableModel
from metalens.plotting import lens_figure, picture_format, save_figure
from metalens.readout import Reading
from metalens.training import TrainingConfig, train

BUNDLED = "demo"
DEFAULT_LENGTH = "[default: 512, or the model's context if that is shorter]"

notes = Console(stderr=True)
F = TypeVar("F", bound=Callable[..., Any])


def one_clear_error(command: F) -> F:
    """Turn the library's errors about input into one line on stderr and exit code 1; METALENS_DEBUG=1 shows where they came from."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, TypeError, OSError, AttributeError, RuntimeError) as error:
            if os.environ.get("METALENS_DEBUG"):
                raise
            raise click.ClickException(str(error)) from error

    return wrapped  # type: ignore[return-value]


class SeveralFiles(click.Command):
    """A command whose --data takes several files in a row, as shells expand them: --data *.txt."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat --data before every file that follows it."""
        expanded: list[str] = []
        files: int | None = None  # that the list being read has so far
        for argument in args:
            if files is not None and argument.startswith("-"):
                expanded += [] if files else ["--data"]  # click says what is missing
                files = None
            if argument == "--data":
                files = 0
            elif files is not None:
                expanded += ["--data", argument]
                files += 1
            else:
                expanded.append(argument)
        return super().parse_args(ctx, [*expanded, "--data"] if files == 0 else expanded)


def load_model(name: str) -> InterpretableModel:
    """A path, a hub id, or 'demo' for the bundled model; on the CPU its layers run on the native kernels."""
    path = str(demonstration.MODEL) if name == BUNDLED and not Path(name).exists() else name
    model = InterpretableModel(path)
    accelerate(model.model)
    return model


def read_text(file: Path) -> str:
    """A text file, with an error that names it."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    if not text.strip():
        raise ValueError(f"{file} is empty. Give a file with text.")
    return text


def print_json(value: Any) -> None:
    """JSON alone on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(table: Any) -> None:
    """A table on stdout; as wide as it needs to be when stdout is not a terminal."""
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def write_picture(reading: Reading, path: Path, title: str, colour: str) -> None:
    """The heat map of a reading, the model's own answer on top."""
    if colour == "probability":
        values, of_model, name = reading.stats.max_probability, reading.model.max_probability, "probability of the top token"
    else:
        values, of_model, name = reading.stats.entropy, reading.model.entropy, "entropy (nats)"
    figure = lens_figure(
        reading.predictions,
        reading.tokens,
        values,
        name,
        title=title,
        model_row=(reading.model_tokens, nested(of_model[0])),
        max_display_tokens=24,
        # Bright is certain in both. Probabilities share one scale, so that two pictures compare.
        cmap="viridis" if colour == "probability" else "viridis_r",
        limits=(0.0, 1.0) if colour == "probability" else None,
    )
    save_figure(figure, path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="metalens")
@click.option("--verbose", is_flag=True, help="Log every training step to stderr.")
def main(verbose: bool) -> None:
    """Train and apply tuned lenses on (quantised) language models.

    MODEL is a folder in mlx-lm's format, a hub id, or 'demo' for the small model that comes with metalens.
    """
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    for chatty in ("matplotlib", "httpx", "urllib3", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


@main.command("train", cls=SeveralFiles)
@click.argument("model")
@click.option(
    "--data", required=True, multiple=True, metavar="FILE...", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="UTF-8 text."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Where the lens goes: OUT.npz and OUT.json.")
@click.option("--steps", default=250, show_default=True, type=click.IntRange(min=1), help="Optimiser steps.")
@click.option("--tokens-per-step", type=click.IntRange(min=1), help="Rounded down to whole sequences.  [default: one sequence; the paper: 262144]")
@click.option("--max-seq-len", type=click.IntRange(min=10), help=f"Tokens per sequence.  {DEFAULT_LENGTH}")
@click.option("--lr", default=1.0, show_default=True, type=float, help="Learning rate at the first step; falls linearly to 0.")
@click.option("--seed", default=0, show_default=True, type=int, help="Of the order of the sequences.")
@one_clear_error
def train_command(
    model: str, data: tuple[Path, ...], out: Path, steps: int, tokens_per_step: int | None, max_seq_len: int | None, lr: float, seed: int
) -> None:
    """Train a tuned lens for MODEL."""
    for file in lens_files(out):
        require_writable(file)
    texts = [read_text(file) for file in data]
    loaded = load_model(model)
    length = max_seq_len or min(loaded.default_sequence_length, tokens_per_step or sys.maxsize)
    config = TrainingConfig(steps, length, tokens_per_step, lr, seed=seed)
    lens = train(loaded.source, loaded.checked_unembed, loaded.training_ids(texts), config, show_progress=True)
    lens.save(out)
    notes.print(f"Lens written to {lens_files(out)[0]} and {lens_files(out)[1].name}.", highlight=False)


@main.command("eval")
@click.argument("model")
@click.option("--lens", "lens_path", type=click.Path(path_type=Path), help="As written by train.  [default: the logit lens alone]")
@click.option("--data", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="UTF-8 text.")
@click.option("--tokens", type=click.IntRange(min=2), help="Read only this many tokens.  [default: all]")
@click.option("--max-seq-len", type=click.IntRange(min=2), help=f"Tokens per sequence.  {DEFAULT_LENGTH}")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@one_clear_error
def eval_command(model: str, lens_path: Path | None, data: Path, tokens: int | None, max_seq_len: int | None, as_json: bool) -> None:
    """Compare the tuned lens with the logit lens, layer by layer (nats per token; layer i is the output of block i)."""
    lens = None if lens_path is None else TunedLens.load(lens_path)
    text = read_text(data)
    evaluation = evaluate(load_model(model), text, lens, max_seq_len=max_seq_len, max_tokens=tokens, show_progress=True)
    if as_json:
        print_json(evaluation.to_dict())
    else:
        print_table(report.evaluation_table(evaluation))


def parse_layers(_: click.Context, __: click.Parameter, value: str | None) -> list[int] | None:
    """'0,4' -> [0, 4]."""
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of layer numbers like 0,4.") from None


@main.command("lens")
@click.argument("model")
@click.argument("prompt")
@click.option("--lens", "lens_path", type=click.Path(path_type=Path), help="A tuned lens.  [default: the logit lens]")
@click.option("--layers", callback=parse_layers, metavar="0,4,...", help="Which blocks.  [default: all]")
@click.option("--top-k", default=3, show_default=True, type=int, help="Predictions per layer and token.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--save", type=click.Path(path_type=Path), help="Also write a heat map, e.g. out.png.")
@click.option(
    "--colour", "--color", type=click.Choice(["probability", "entropy"]), default="probability", show_default=True, help="What the heat map shows."
)
@one_clear_error
def lens_command(
    model: str, prompt: str, lens_path: Path | None, layers: list[int] | None, top_k: int, as_json: bool, save: Path | None, colour: str
) -> None:
    """Show what every block of MODEL would predict after each token of PROMPT."""
    lens = None if lens_path is None else TunedLens.load(lens_path)
    if save is not None:
        picture_format(save)
        require_writable(save)
    reading = load_model(model).read(prompt, lens, top_k, layers)
    title = f"{'logit' if lens is None else 'tuned'} lens of {model}"
    if as_json:
        print_json({"tokens": reading.tokens, "layers": {str(layer): rows for layer, rows in reading.predictions.items()}})
    else:
        print_table(report.reading_table(reading, title))
    if save is not None:
        write_picture(reading, save, title, colour)
        notes.print(f"Picture written to {save}.", highlight=False)


@main.command("demo")
@click.option(
    "--out", default="demo_output", show_default=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for lens, tables and pictures."
)
@one_clear_error
def demo_command(out: Path) -> None:
    """Train a lens for the bundled model on the bundled text, and show that it beats the logit lens on held-out text."""
    require_writable(out / "lens.npz")
    result = demonstration.run(load_model(BUNDLED), show_progress=True)
    result.lens.save(out / "lens")
    with atomic_write(out / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(result.evaluation.to_dict(), indent=2) + "\n")
    table = report.evaluation_table(result.evaluation)
    with atomic_write(out / "evaluation.txt") as temporary, temporary.open("w", encoding="utf-8") as file:
        Console(file=file, width=120).print(table)
    print_table(table)
    for name, reading in (("logit", result.logit), ("tuned", result.tuned)):
        title = f"{name} lens: what each layer would say next"
        print_table(report.reading_table(reading, title))
        write_picture(reading, out / f"{name}_lens.png", title, "probability")
    notes.print(f"Lens, evaluation and pictures are in {out}/. Try: metalens lens demo 'Your prompt' --lens {out}/lens", highlight=False)


@main.command("roofline")
@click.argument("model")
@click.option("--chip", "chips", multiple=True, type=click.Choice(list(roofline.CHIPS)), help="Repeat it for several.  [default: all]")
@click.option(
    "--tokens", default=512, show_default=True, type=click.IntRange(min=1), help="Of a batch; with few, reading the head is what takes time."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@one_clear_error
def roofline_command(model: str, chips: tuple[str, ...], tokens: int, as_json: bool) -> None:
    """Bound a lens's speed on Apple GPUs: tokens per second at most, from counted work and published numbers. A model, not a measurement.

    MODEL is a folder with a config.json (its weights are not read), 'demo', or one of Llama-3.2-1B-4bit, Llama-3.1-8B-4bit, Llama-3.1-70B-4bit.
    """
    found = roofline.dimensions(str(demonstration.MODEL) if model == BUNDLED and not Path(model).exists() else model)
    bounds = {chip: roofline.bounds(found, roofline.CHIPS[chip], tokens) for chip in chips or roofline.CHIPS}
    if as_json:
        print_json({"what": roofline.WHAT, "model": vars(found), "tokens": tokens, "tokens per second at most": bounds})
    else:
        print_table(report.roofline_table(bounds, f"{model}, batches of {tokens} tokens: tokens per second at most"))
        notes.print(roofline.WHAT, highlight=False)


@main.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@one_clear_error
def doctor_command(as_json: bool) -> None:
    """Show which backends and kernels are in use here, and why not others. Exit code 1 if something needs mending."""
    facts = diagnosis.examine()
    if as_json:
        print_json(facts)
    else:
        print_table(report.facts_table({k: v for k, v in facts.items() if k != "problems"}, "metalens doctor"))
        for problem in facts["problems"] or ["Everything works."]:
            notes.print(problem, highlight=False)
    if facts["problems"]:
        sys.exit(1)
