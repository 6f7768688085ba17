"""metalens analyze anomalies: tell anomalous prompts from normal ones by their trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metalens.cli.analyze_options import AnalysisOptions, analysis_options
from metalens.cli.common import FilePath, load_model, print_json, print_table
from metalens.utils.errors import InvalidValueError

if TYPE_CHECKING:
    from metalens.lenses.lens import Lens
    from metalens.model import InterpretableModel

DETECTOR_NAMES = ("isolation-forest", "local-outlier-factor", "mahalanobis", "relative-mahalanobis")


@click.command("anomalies")
@click.argument("model")
@click.option(
    "--normal",
    required=True,
    type=FilePath(exists=True, dir_okay=False),
    metavar="FILE",
    help="JSON Lines of usual prompts: questions with choices, or with --features statistics or hidden also texts.",
)
@click.option("--anomalous", required=True, type=FilePath(exists=True, dir_okay=False), metavar="FILE", help="Prompts to detect, in the same form.")
@click.option(
    "--features",
    type=click.Choice(["choices", "statistics", "hidden"]),
    default="choices",
    show_default=True,
    help="What a detector sees: the log-probabilities of the choices at every layer; entropy and largest probability at every layer; or the hidden "
    "state after the middle block, or the first one of --layers.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(DETECTOR_NAMES),
    default=DETECTOR_NAMES[:3],
    show_default=True,
    help="Detector. Repeat it for more.",
)
@analysis_options("the ROC curves")
def anomalies_command(model: str, normal: Path, anomalous: Path, features: str, methods: tuple[str, ...], options: AnalysisOptions) -> None:
    """Tell anomalous prompts from normal ones by how their predictions move through the layers.

    Each detector is fitted to three quarters of the normal prompts, and tested on the others and on the anomalous ones.
    """
    from metalens.analysis import as_json as plain
    from metalens.analysis import detect_anomalies

    if features == "hidden" and options.lens_path is not None:
        raise InvalidValueError("--features hidden uses no lens. Leave --lens out, or choose other features.")
    options.check([normal, anomalous])
    lenses = {"hidden states": None} if features == "hidden" else options.lenses()
    loaded = load_model(model)
    found = {}
    for name, lens in lenses.items():
        usual, unusual = (_features(loaded, path, features, lens, options.layers) for path in (normal, anomalous))
        found[name] = [detect_anomalies(usual, unusual, method, seed=options.seed) for method in methods]
    if options.as_json:
        print_json(plain(found))
    else:
        from metalens.display.prediction_tables import detection_table

        first = next(iter(found.values()))[0]
        counts = f"{first.fitted} normal prompts to fit, {len(first.normal)} and {len(first.anomalous)} anomalous ones to test"
        print_table(detection_table(found, f"{model}: {counts}"))
    from metalens.display.prediction_figures import detection_figure

    options.draw(lambda: detection_figure(found, f"{model}: anomalous prompts by {features}"))


def _features(model: InterpretableModel, path: Path, features: str, lens: Lens | None, layers: list[int] | None) -> Any:
    """Return the features of the prompts in a file."""
    from metalens.analysis import hidden_features, read_prompts, read_questions, score_choices, trajectory_features

    if features == "choices":
        return score_choices(model, read_questions(path), lens, layers=layers, show_progress=True).features()
    prompts = read_prompts(path)
    if features == "hidden":
        return hidden_features(model, prompts, None if layers is None else layers[0])
    return trajectory_features([model.trajectory(prompt, lens, layers=layers, position=-1, compare=False, top_k=1) for prompt in prompts])
