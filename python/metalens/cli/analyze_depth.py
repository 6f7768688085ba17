"""metalens analyze depth: the layer at which each prediction settles, and the step at which it was learned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metalens.cli.analyze_options import check_picture, layers_option, normalize_option, opened_lenses, questions_option, seed_option, write_picture
from metalens.cli.analyze_text import opened_text
from metalens.cli.common import (
    SeveralFiles,
    data_options,
    force_option,
    json_option,
    lens_option,
    load_model,
    note,
    one_clear_error,
    print_json,
    print_table,
    save_option,
)
from metalens.utils.errors import InvalidValueError

if TYPE_CHECKING:
    from metalens.analysis.choices import Normalize
    from metalens.lenses.lens import Lens
    from metalens.model import InterpretableModel


@click.command("depth", cls=SeveralFiles)
@click.argument("model")
@data_options(required=False, split="test")
@questions_option(required=False)
@lens_option
@layers_option
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    metavar="MODEL",
    help="Earlier state of MODEL in its training. Repeat it, in the order of the training.",
)
@click.option("--steps", metavar="0,1000,...", help="Training step of each checkpoint, then of MODEL.  [default: 0, 1, 2, ...]")
@normalize_option
@click.option("--max-tokens", type=click.IntRange(min=2), help="Tokens of --data to read.  [default: all]")
@click.option("--max-seq-len", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens per sequence of --data.")
@seed_option
@save_option("the depths, and with --checkpoint the depths by iteration learned")
@force_option
@json_option
@one_clear_error
def depth_command(
    model: str,
    data: tuple[str, ...],
    field: str,
    split: str,
    questions_path: Path | None,
    lens_path: Path | None,
    layers: list[int] | None,
    checkpoints: tuple[str, ...],
    steps: str | None,
    normalize: Normalize,
    max_tokens: int | None,
    max_seq_len: int,
    seed: int,
    picture: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Find the layer at which each prediction settles, on the text of --data or on --questions.

    With --checkpoint also the step of the training from which on the prediction is MODEL's, and the rank correlation of the two.
    """
    from metalens.analysis import Difficulty, checkpoint_predictions, iteration_learned
    from metalens.analysis import as_json as plain

    if (questions_path is None) == (not data):
        raise InvalidValueError("Give the examples either as a text (--data) or as questions (--questions).")
    named = _steps(steps, len(checkpoints) + 1)
    check_picture(picture, force, [Path(name) for name in data] if questions_path is None else [questions_path], lens_path)
    lenses, loaded = opened_lenses(lens_path), load_model(model)
    if questions_path is None:
        depths, groups, predict = _of_text(loaded, lenses, layers, data, field, split, max_tokens, max_seq_len)
    else:
        depths, groups, predict = _of_questions(loaded, lenses, layers, questions_path, normalize)
    rows = layers if layers is not None else list(range(loaded.num_layers))
    learned = iteration_learned(checkpoint_predictions([*checkpoints, loaded], predict), named) if checkpoints else None
    correlations = {} if learned is None else {name: Difficulty(depth, learned, groups).correlation(seed=seed) for name, depth in depths.items()}
    if as_json:
        answer = {"layers": rows, "depths": depths, "groups": groups}
        print_json(plain(answer if learned is None else answer | {"learned": learned, "correlation": correlations}))
    else:
        from metalens.display.format import interval
        from metalens.display.prediction_tables import depth_table

        print_table(depth_table(depths, rows, f"{model}: {len(groups)} predictions"))
        for name, found in correlations.items():
            note(f"Rank correlation of prediction depth ({name}) and iteration learned: {interval(found)}")
    if picture is not None:
        from metalens.display.prediction_figures import depth_figure

        write_picture(depth_figure(depths, rows, learned, f"{model}: {len(groups)} predictions"), picture, force)


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
    data: tuple[str, ...],
    field: str,
    split: str,
    max_tokens: int | None,
    max_seq_len: int,
) -> tuple[Any, Any, Any]:
    """Return the depths of each lens, the text of each position, and what predicts the same positions by another model."""
    from metalens.analysis import sequences_of, text_depths, text_predictions

    texts = sequences_of(model, opened_text(model, data, field, split, max_tokens), max_seq_len=max_seq_len, max_tokens=max_tokens)
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
