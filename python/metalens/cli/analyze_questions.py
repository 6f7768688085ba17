"""metalens analyze questions: how well every layer answers questions, after true and after false demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from metalens.cli.analyze_options import AnalysisOptions, analysis_options, normalize_option, questions_option
from metalens.cli.common import load_model, note, print_json, print_table

if TYPE_CHECKING:
    from metalens.analysis.choices import ChoiceScores, Normalize
    from metalens.analysis.resampling import Interval


@click.command("questions")
@click.argument("model")
@questions_option(required=True)
@click.option("--shots", default=0, show_default=True, type=click.IntRange(min=0), help="Demonstrations before each question, once true, once false.")
@normalize_option
@click.option("--limit", type=click.IntRange(min=1), help="Questions to ask, from the start.  [default: all]")
@click.option("--bins", type=click.IntRange(min=1), help="Bins of the calibration error.  [default: as many as accuracies rise over]")
@analysis_options("accuracy and calibration error by layer")
def questions_command(
    model: str,
    questions_path: Path,
    shots: int,
    normalize: Normalize,
    limit: int | None,
    bins: int | None,
    options: AnalysisOptions,
) -> None:
    """Answer questions from every layer: accuracy with its interval, calibrated accuracy, expected calibration error.

    A model that overthinks answers better at a middle layer after false demonstrations (--shots).
    """
    from metalens.analysis import accuracy_by_layer, overthinking, read_questions, score_choices
    from metalens.analysis import as_json as plain

    options.check([questions_path])
    questions = read_questions(questions_path)
    lenses, loaded = options.lenses(), load_model(model)
    scores: dict[str, ChoiceScores] = {}
    best: dict[str, tuple[int, Interval]] = {}
    for name, lens in lenses.items():
        if shots:
            both = overthinking(loaded, questions, lens, shots=shots, layers=options.layers, limit=limit, seed=options.seed, show_progress=True)
            scores |= {f"{name}, true": both.true, f"{name}, false": both.false}
            best[name] = both.best_layer(normalize, seed=options.seed)
        else:
            scores[name] = score_choices(loaded, questions[:limit], lens, layers=options.layers, show_progress=True)
    found = {name: accuracy_by_layer(each, normalize, bins=bins, seed=options.seed) for name, each in scores.items()}
    count = len(questions[:limit])
    title = f"{model}: {count} questions" + (f", {shots} demonstrations" if shots else "")
    if options.as_json:
        chosen = {name: {"layer": layer, "gain": gain} for name, (layer, gain) in best.items()}
        print_json(plain({"questions": count, "shots": shots, "accuracy": found} | ({"best_after_false": chosen} if shots else {})))
    else:
        from metalens.display.format import interval
        from metalens.display.prediction_tables import accuracy_table

        print_table(accuracy_table(found, title))
        for name, (layer, gain) in best.items():
            note(f"After false demonstrations, {name}: layer {layer} answers best; its accuracy less the model's is {interval(gain)}.")
    from metalens.display.prediction_figures import accuracy_figure

    sizes = {len(question.choices) for question in questions}
    options.draw(lambda: accuracy_figure(found, title, 1 / min(sizes) if sizes != {1} and len(sizes) == 1 else None))
