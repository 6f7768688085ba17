"""metalens analyze questions: how well every layer answers questions, after true and after false demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from metalens.cli.analyze_options import check_picture, layers_option, normalize_option, opened_lenses, questions_option, seed_option, write_picture
from metalens.cli.common import force_option, json_option, lens_option, load_model, note, one_clear_error, print_json, print_table, save_option

if TYPE_CHECKING:
    from metalens.analysis.choices import ChoiceScores, Normalize
    from metalens.analysis.resampling import Interval


@click.command("questions")
@click.argument("model")
@questions_option(required=True)
@lens_option
@layers_option
@click.option("--shots", default=0, show_default=True, type=click.IntRange(min=0), help="Demonstrations before each question, once true, once false.")
@normalize_option
@click.option("--limit", type=click.IntRange(min=1), help="Questions to ask, from the start.  [default: all]")
@click.option("--bins", type=click.IntRange(min=1), help="Bins of the calibration error.  [default: as many as accuracies rise over]")
@seed_option
@save_option("accuracy and calibration error by layer")
@force_option
@json_option
@one_clear_error
def questions_command(
    model: str,
    questions_path: Path,
    lens_path: Path | None,
    layers: list[int] | None,
    shots: int,
    normalize: Normalize,
    limit: int | None,
    bins: int | None,
    seed: int,
    picture: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Answer questions from every layer: accuracy with its interval, calibrated accuracy, expected calibration error.

    A model that overthinks answers better at a middle layer after false demonstrations (--shots).
    """
    from metalens.analysis import accuracy_by_layer, overthinking, read_questions, score_choices
    from metalens.analysis import as_json as plain

    check_picture(picture, force, [questions_path], lens_path)
    questions = read_questions(questions_path)
    lenses, loaded = opened_lenses(lens_path), load_model(model)
    scores: dict[str, ChoiceScores] = {}
    best: dict[str, tuple[int, Interval]] = {}
    for name, lens in lenses.items():
        if shots:
            both = overthinking(loaded, questions, lens, shots=shots, layers=layers, limit=limit, seed=seed, show_progress=True)
            scores |= {f"{name}, true": both.true, f"{name}, false": both.false}
            best[name] = both.best_layer(normalize, seed=seed)
        else:
            scores[name] = score_choices(loaded, questions[:limit], lens, layers=layers, show_progress=True)
    found = {name: accuracy_by_layer(each, normalize, bins=bins, seed=seed) for name, each in scores.items()}
    count = len(questions[:limit])
    title = f"{model}: {count} questions" + (f", {shots} demonstrations" if shots else "")
    if as_json:
        chosen = {name: {"layer": layer, "gain": gain} for name, (layer, gain) in best.items()}
        print_json(plain({"questions": count, "shots": shots, "accuracy": found} | ({"best_after_false": chosen} if shots else {})))
    else:
        from metalens.display.format import interval
        from metalens.display.prediction_tables import accuracy_table

        print_table(accuracy_table(found, title))
        for name, (layer, gain) in best.items():
            note(f"After false demonstrations, {name}: layer {layer} answers best; its accuracy less the model's is {interval(gain)}.")
    if picture is not None:
        from metalens.display.prediction_figures import accuracy_figure

        sizes = {len(question.choices) for question in questions}
        write_picture(accuracy_figure(found, title, 1 / sizes.pop() if sizes != {1} and len(sizes) == 1 else None), picture, force)
