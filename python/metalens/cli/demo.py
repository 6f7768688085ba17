"""metalens demo: the main job. Train a lens, compare it with the logit lens on held-out text, read a prompt through both.

Without an option it uses the bundled model, and takes about a minute. `--model smollm2` shows the same on a pretrained model, beside the closed form.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from metalens.cli.common import FilePath, force_option, load_model, note, one_clear_error, print_table
from metalens.estimate.memory import plan
from metalens.evaluation import Evaluation, evaluate
from metalens.evaluation.results import result_outputs
from metalens.lenses.lens import TunedLens
from metalens.lenses.lens_file import lens_outputs
from metalens.model import InterpretableModel
from metalens.models.bundled import HELD_OUT_TEXT, MODEL, NAME, TRAINING_TEXT
from metalens.models.facts import facts_of_model
from metalens.readings.reading import Reading
from metalens.training import recipe, train
from metalens.utils.files import atomic_write, require_writable
from metalens.utils.outputs import Output, picture_output, require_replaceable

PROMPT = "Click the button in the top right corner of the window to open the"

# The default recipe, in the small steps that suit a text of 43,008 tokens.
CONFIG = recipe("fast", num_steps=240, max_seq_len=128, tokens_per_step=128, warm_start_tokens=12288, seed=0)
HELD_OUT_TOKENS = 8192

# A pretrained model answers this one, and is larger: fewer tokens have to do.
PRETRAINED_PROMPT = "The capital of France is"
PRETRAINED_HELD_OUT_TOKENS = 512
PRETRAINED_LENGTH = 256
PRETRAINED_MINUTES = 6.0
PRETRAINED_WARM_START = 8192  # at most
LEAST_SEQUENCES = 4

PICTURE_LAYERS = 16  # at most, in the picture of both lenses: it has to be legible


@dataclass(frozen=True)
class Demo:
    """The results of the demo.

    Attributes:
        lens: the trained lens.
        evaluation: its scores on the held-out text, beside the logit lens's.
        logit: the prompt, read through the logit lens.
        tuned: the prompt, read through the trained lens.
        ridge: the scores of the closed form alone on the held-out text. None = not measured.
    """

    lens: TunedLens
    evaluation: Evaluation
    logit: Reading
    tuned: Reading
    ridge: Evaluation | None = None


def run(model: InterpretableModel, *, show_progress: bool = False) -> Demo:
    """Train on the bundled text, evaluate on the held-out text, read the prompt."""
    ids = model.training_ids([TRAINING_TEXT.read_text(encoding="utf-8")])
    lens = train(model, ids, recipe="fast", config=CONFIG, show_progress=show_progress)
    text = HELD_OUT_TEXT.read_text(encoding="utf-8")
    evaluation = evaluate(model, text, lens, max_seq_len=CONFIG.max_seq_len, max_tokens=HELD_OUT_TOKENS, show_progress=show_progress)
    return Demo(lens, evaluation, model.read(PROMPT), model.read(PROMPT, lens))


def run_on(model: InterpretableModel, minutes: float | None, tokens: int | None = None, *, show_progress: bool = False) -> Demo:
    """Do the same on any model, with a budget in minutes or tokens for the training, and measure the closed form beside it.

    The closed form sees the tokens of the lens's warm start. On a slow machine, a budget in minutes is LEAST_SEQUENCES sequences: less shows nothing.
    """
    text = TRAINING_TEXT.read_text(encoding="utf-8")
    settings: dict[str, Any] = {"max_seq_len": PRETRAINED_LENGTH, "warm_start_tokens": PRETRAINED_WARM_START}
    if tokens is None:
        tokens = max(LEAST_SEQUENCES * PRETRAINED_LENGTH, plan(facts_of_model(model), "fast", minutes=minutes, **settings).config.total_tokens)
    lens = train(model, [text], recipe="fast", tokens=tokens, show_progress=show_progress, **settings)
    warm = int(lens.provenance["training"]["warm_start_tokens"])
    ridge = train(model, [text], recipe="fast", show_progress=show_progress, num_steps=0, **(settings | {"warm_start_tokens": warm}))

    def measured(each: TunedLens) -> Evaluation:
        held_out = HELD_OUT_TEXT.read_text(encoding="utf-8")
        return evaluate(model, held_out, each, max_seq_len=PRETRAINED_LENGTH, max_tokens=PRETRAINED_HELD_OUT_TOKENS, show_progress=show_progress)

    return Demo(lens, measured(lens), model.read(PRETRAINED_PROMPT), model.read(PRETRAINED_PROMPT, lens), measured(ridge))


@click.command("demo")
@click.option(
    "--out",
    default="demo_output",
    show_default=True,
    type=FilePath(file_okay=False),
    help="Folder for the lens, the tables and the pictures.",
)
@click.option("--model", default=NAME, show_default=True, metavar="MODEL", help="Another model, such as 'smollm2', beside the closed form.")
@click.option(
    "--minutes", type=click.FloatRange(min=0, min_open=True), default=PRETRAINED_MINUTES, show_default=True, help="Training time on another model."
)
@click.option("--tokens", type=click.IntRange(min=1), help="Training tokens on another model, in place of --minutes: the same on every machine.")
@force_option
@one_clear_error
def demo_command(out: Path, model: str, minutes: float, tokens: int | None, force: bool) -> None:
    """Train a lens on the bundled text, and show that it is better than the logit lens on held-out text."""
    from metalens.display.tables import closed_form_table, evaluation_table

    require_writable(out / "lens.npz")
    require_replaceable(_outputs(out), force=force)
    # The bundled model by its path: OUT may be called 'demo'.
    loaded = load_model(str(MODEL) if model == NAME else model)
    result = run(loaded, show_progress=True) if model == NAME else run_on(loaded, None if tokens else minutes, tokens, show_progress=True)
    result.lens.save(out / "lens", force=force)
    with atomic_write(out / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(result.evaluation.to_dict(), indent=2) + "\n")
    table = evaluation_table(result.evaluation)
    _write_table(table, out / "evaluation.txt")
    print_table(table)
    if result.ridge is not None:
        with atomic_write(out / "closed_form.json") as temporary:
            temporary.write_text(json.dumps(result.ridge.to_dict(), indent=2) + "\n")
        print_table(closed_form_table(result.evaluation, result.ridge))
    _show_reading(result.logit, "logit", out, force)
    _show_reading(result.tuned, "tuned", out, force)
    _draw_both(loaded, result.lens, PROMPT if model == NAME else PRETRAINED_PROMPT, out / "lenses.png", force)
    note(f"Lens, evaluation and pictures are in {out}/. Try: metalens lens {model} 'Your prompt' --lens {out}/lens")


def _outputs(out: Path) -> list[Output]:
    """Return the files that the demo writes."""
    evaluation = result_outputs(out)[0]
    table = Output(
        out / "evaluation.txt", "the table of an evaluation", lambda _: evaluation.path.is_file() and evaluation.recognizes(evaluation.path)
    )
    closed_form = evaluation._replace(path=out / "closed_form.json")
    pictures = [picture_output(out / f"{name}.png") for name in ("logit_lens", "tuned_lens", "lenses")]
    return [*lens_outputs(out / "lens"), evaluation, table, closed_form, *pictures]


def _write_table(table: object, path: Path) -> None:
    from rich.console import Console

    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        Console(file=file, width=120).print(table)


def _show_reading(reading: Reading, name: str, out: Path, force: bool) -> None:
    from metalens.display.tables import reading_table

    title = f"{name} lens: what each layer would say next"
    print_table(reading_table(reading, title))
    reading.save(out / f"{name}_lens.png", title=title, force=force)


def _draw_both(model: InterpretableModel, lens: TunedLens, prompt: str, path: Path, force: bool) -> None:
    """Draw the prompt through both lenses side by side, in layers that are evenly spaced down from the last one."""
    from metalens.display.figures import readings_figure
    from metalens.readings.heat_map import save_figure

    layers = range(model.num_layers - 1, -1, -math.ceil(model.num_layers / PICTURE_LAYERS))
    readings = {"logit lens": model.read(prompt, layers=layers), "tuned lens": model.read(prompt, lens, layers=layers)}
    save_figure(readings_figure(readings, "What each layer would say next"), path, force=force)
