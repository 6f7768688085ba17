"""metalens analyze: what the tuned-lens paper does with lenses, one command for each analysis."""

from __future__ import annotations

import click

from metalens.cli.lazy import LazyCommand, LazyGroup

ANALYSES: dict[str, LazyCommand] = {
    "causal": LazyCommand("analyze_causal", "Find the directions that a lens depends on, and ablate them in MODEL."),
    "alignment": LazyCommand("analyze_causal", "Compare how a lens and MODEL answer to changed hidden states."),
    "layers": LazyCommand("analyze_layers", "Delete, swap and replace blocks, and measure what that does."),
    "residuals": LazyCommand("analyze_layers", "Measure mean, covariance and rogue dimensions of hidden states."),
    "questions": LazyCommand("analyze_questions", "Answer questions from every layer: accuracy, calibration, overthinking."),
    "depth": LazyCommand("analyze_depth", "Find the layer at which each prediction settles, and the step at which it was learned."),
    "anomalies": LazyCommand("analyze_anomalies", "Tell anomalous prompts from normal ones by their trajectories."),
    "weights": LazyCommand("analyze_weights", "Read what the rows of MLP and attention matrices promote."),
}


@click.group("analyze", cls=LazyGroup, table=ANALYSES)
def analyze_command() -> None:
    """Examine MODEL through a lens, as the tuned-lens paper does (Belrose et al. 2023).

    Each analysis reads the text of --data, and prints a table, or JSON with --json. --save draws the figure.
    """
