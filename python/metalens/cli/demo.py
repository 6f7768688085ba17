"""metalens demo: the main job on the bundled model. Train a lens, compare it with the logit lens on held-out text, read a prompt through both."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import click

from metalens.cli.common import FilePath, force_option, load_model, note, one_clear_error, print_table
from metalens.evaluation import Evaluation, evaluate
from metalens.evaluation.results import result_outputs
from metalens.lenses.lens import TunedLens
from metalens.lenses.lens_file import lens_outputs
from metalens.model import InterpretableModel
from metalens.models.bundled import HELD_OUT_TEXT, MODEL, TRAINING_TEXT
from metalens.readings.reading import Reading
from metalens.training import recipe, train
from metalens.utils.files import atomic_write, require_writable
from metalens.utils.outputs import Output, picture_output, require_replaceable

PROMPT = "Click the button in the top right corner of the window to open the"

# The default recipe, in the small steps that suit a text of 43,008 tokens.
CONFIG = recipe("fast", num_steps=240, max_seq_len=128, tokens_per_step=128, warm_start_tokens=12288, seed=0)
HELD_OUT_TOKENS = 8192


@dataclass(frozen=True)
class Demo:
    """The results of the demo.

    Attributes:
        lens: the trained lens.
        evaluation: its scores on the held-out text, beside the logit lens's.
        logit: the prompt, read through the logit lens.
        tuned: the prompt, read through the trained lens.
    """

    lens: TunedLens
    evaluation: Evaluation
    logit: Reading
    tuned: Reading


def run(model: InterpretableModel, *, show_progress: bool = False) -> Demo:
    """Train on the bundled text, evaluate on the held-out text, read the prompt."""
    ids = model.training_ids([TRAINING_TEXT.read_text(encoding="utf-8")])
    lens = train(model, ids, recipe="fast", config=CONFIG, show_progress=show_progress)
    text = HELD_OUT_TEXT.read_text(encoding="utf-8")
    evaluation = evaluate(model, text, lens, max_seq_len=CONFIG.max_seq_len, max_tokens=HELD_OUT_TOKENS, show_progress=show_progress)
    return Demo(lens, evaluation, model.read(PROMPT), model.read(PROMPT, lens))


@click.command("demo")
@click.option(
    "--out",
    default="demo_output",
    show_default=True,
    type=FilePath(file_okay=False),
    help="Folder for the lens, the tables and the pictures.",
)
@force_option
@one_clear_error
def demo_command(out: Path, force: bool) -> None:
    """Train a lens for the bundled model on the bundled text, and show that it is better than the logit lens on held-out text."""
    from metalens.display.tables import evaluation_table

    require_writable(out / "lens.npz")
    require_replaceable(_outputs(out), force=force)
    result = run(load_model(str(MODEL)), show_progress=True)  # by its path: OUT may be called 'demo'
    result.lens.save(out / "lens", force=force)
    with atomic_write(out / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(result.evaluation.to_dict(), indent=2) + "\n")
    table = evaluation_table(result.evaluation)
    _write_table(table, out / "evaluation.txt")
    print_table(table)
    _show_reading(result.logit, "logit", out, force)
    _show_reading(result.tuned, "tuned", out, force)
    note(f"Lens, evaluation and pictures are in {out}/. Try: metalens lens demo 'Your prompt' --lens {out}/lens")


def _outputs(out: Path) -> list[Output]:
    """Return the files that the demo writes."""
    evaluation = result_outputs(out)[0]
    table = Output(
        out / "evaluation.txt", "the table of an evaluation", lambda _: evaluation.path.is_file() and evaluation.recognizes(evaluation.path)
    )
    return [*lens_outputs(out / "lens"), evaluation, table, *(picture_output(out / f"{name}_lens.png") for name in ("logit", "tuned"))]


def _write_table(table: object, path: Path) -> None:
    from rich.console import Console

    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        Console(file=file, width=120).print(table)


def _show_reading(reading: Reading, name: str, out: Path, force: bool) -> None:
    from metalens.display.tables import reading_table

    title = f"{name} lens: what each layer would say next"
    print_table(reading_table(reading, title))
    reading.save(out / f"{name}_lens.png", title=title, force=force)
