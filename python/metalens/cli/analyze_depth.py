"""metalens analyze depth: the layer at which each prediction settles, and the step at which it was learned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metalens.cli.analyze_options import AnalysisOptions, analysis_options, normalize_option, questions_option, refuse
from metalens.cli.analyze_text import ABOUT_THE_TEXT, TextOptions, text_options
from metalens.cli.common import SeveralFiles, load_model, note, print_json, print_table
from metalens.utils.errors import InvalidValueError

if TYPE_CHECKING:
    from metalens.analysis.choices import Normalize
    from metalens.lenses.lens import Lens
    from metalens.model import InterpretableModel


@click.command("depth", cls=SeveralFiles)
@click.argument("model")
@text_options(max_seq_len=128, max_tokens="all", required=False)
@questions_option(required=False)
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    metavar="MODEL",
    help="Earlier state of MODEL in its training. Repeat it, in the order of the training.",
)
@click.option("--steps", metavar="0,1000,...", help="Training step of each checkpoint, then of MODEL.  [default: 0, 1, 2, ...]")
@normalize_option
@analysis_options("the depths, and with --checkpoint the depths by iteration learned")
def depth_command(
    model: str,
    text: TextOptions,
    questions_path: Path | None,
    checkpoints: tuple[str, ...],
    steps: str | None,
    normalize: Normalize,
    options: AnalysisOptions,
) -> None:
    """Find the layer at which each prediction settles, on the text of --data or on --questions.

    --normalize is for questions; the options of how a text is read and cut are for --data.

    With --checkpoint also the step of the training from which on the prediction is MODEL's, and the rank correlation of the two.
    """
    from metalens.analysis import Difficulty, checkpoint_predictions, iteration_learned
    from metalens.analysis import as_json as plain

    if (questions_path is None) == (not text.data):
        raise InvalidValueError("Give the examples either as a text (--data) or as questions (--questions).")
    if questions_path is None:
        refuse({"normalize": "--normalize"}, "The predictions of a text have no choices whose length could be divided by.")
    else:
        refuse(ABOUT_THE_TEXT, "Questions are read whole, each as it is.")
    named = _steps(steps, len(checkpoints) + 1)
    options.check(text.inputs if questions_path is None else [questions_path])
    lenses, loaded = options.lenses(), load_model(model)
    if questions_path is None:
        depths, groups, predict = _of_text(loaded, lenses, options.layers, text)
    else:
        depths, groups, predict = _of_questions(loaded, lenses, options.layers, questions_path, normalize)
    rows = options.layers if options.layers is not None else list(range(loaded.num_layers))
    learned = iteration_learned(checkpoint_predictions([*checkpoints, loaded], predict), named) if checkpoints else None
    correlations = (
        {} if learned is None else {name: Difficulty(depth, learned, groups).correlation(seed=options.seed) for name, depth in depths.items()}
    )
    if options.as_json:
        answer = {"layers": rows, "depths": depths, "groups": groups}
        print_json(plain(answer if learned is None else answer | {"learned": learned, "correlation": correlations}))
    else:
        from metalens.display.format import interval
        from metalens.display.prediction_tables import depth_table

        print_table(depth_table(depths, rows, f"{model}: {len(groups)} predictions"))
        for name, found in correlations.items():
            note(f"Rank correlation of prediction depth ({name}) and iteration learned: {interval(found)}")
    from metalens.display.prediction_figures import depth_figure

    options.draw(lambda: depth_figure(depths, rows, learned, f"{model}: {len(groups)} predictions"))


def _steps(given: str | None, count: int) -> list[int] | None:
    if given is None:
        return None
    try:
        found = [int(step) for step in given.split(",")]
    except ValueError:
        found = []
    if len(found) != count:
        raise InvalidValueError(
            f"--steps must be {count} whole numbers with commas between them, one for each checkpoint and one for MODEL; got {given!r:.80}."
        )
    return found


def _of_text(
    model: InterpretableModel,
    lenses: dict[str, Lens | None],
    layers: list[int] | None,
    text: TextOptions,
) -> tuple[Any, Any, Any]:
    """Return the depths of each lens, the text of each position, and what predicts the same positions by another model."""
    from metalens.analysis import text_depths, text_predictions

    texts = text.sequences(model)
    found = {name: text_depths(model, texts, lens, layers) for name, lens in lenses.items()}
    return {name: depths for name, (depths, _) in found.items()}, next(iter(found.values()))[1], text_predictions(texts)


def _of_questions(
    model: InterpretableModel, lenses: dict[str, Lens | None], layers: list[int] | None, path: Path, normalize: Normalize
) -> tuple[Any, Any, Any]:
    """Return the depths of each lens, the number of each question, and what predicts the same questions by another model."""
    import numpy as np

    from metalens.analysis import question_predictions, read_questions, score_choices

    questions = read_questions(path)
    depths = {name: score_choices(model, questions, lens, layers=layers).prediction_depth(normalize) for name, lens in lenses.items()}
    return depths, np.arange(len(questions)), question_predictions(questions, normalize)
