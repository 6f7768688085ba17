"""metalens analyze layers | residuals: what each block does to the predictions, and what its hidden states look like."""

from __future__ import annotations

from typing import Any, Literal

import click

from metalens.analysis.changed_layers import CHANGES
from metalens.cli.analyze_options import AnalysisOptions, analysis_options
from metalens.cli.analyze_text import TextOptions, text_options
from metalens.cli.common import SeveralFiles, load_model, note, print_json, print_table
from metalens.utils.errors import InvalidValueError


@click.command("layers", cls=SeveralFiles)
@click.argument("model")
@text_options(max_seq_len=128, max_tokens=512)
@click.option(
    "--change",
    "changes",
    multiple=True,
    type=click.Choice(list(CHANGES)),
    default=("delete", "swap", "replace"),
    show_default=True,
    help="Change of a block: add nothing, change places with the next one, let the one before compute in its place, add the mean of what it adds, "
    "or what it adds elsewhere. Repeat it for more changes.",
)
@click.option(
    "--gradient",
    type=click.Choice(["lens", "model"]),
    help="Also measure the cosine of what each block adds and the gradient of the cross-entropy at its input: of the lens there, or of MODEL.",
)
@analysis_options("the effects by layer")
def layers_command(
    model: str, text: TextOptions, changes: tuple[str, ...], gradient: Literal["lens", "model"] | None, options: AnalysisOptions
) -> None:
    """Delete, swap and replace blocks of MODEL one at a time, and measure what that does to its predictions."""
    from metalens.analysis import as_json as plain
    from metalens.analysis import gradient_alignment, layer_effects

    if options.lens_path is not None and gradient != "lens":
        raise InvalidValueError(
            "--lens is only for --gradient lens: the changes compare MODEL with itself. Leave --lens out, or add --gradient lens."
        )
    options.check(text.inputs)
    loaded = load_model(model)
    sequences = text.sequences(loaded)
    common: dict[str, Any] = {**text.settings, "seed": options.seed, "show_progress": True}
    effects = layer_effects(loaded, sequences, changes, layers=options.layers, **common)
    gradients = gradient_alignment(loaded, sequences, options.lens_path, of=gradient, **common) if gradient else []
    title = f"changed blocks of {model}"
    if options.as_json:
        print_json({"layers": plain(effects), "gradient": plain(gradients)})
    else:
        from metalens.display.causal_tables import layers_table

        print_table(layers_table(effects, gradients, title))
    from metalens.display.causal_figures import layers_figure

    options.draw(lambda: layers_figure(effects, gradients, title))


@click.command("residuals", cls=SeveralFiles)
@click.argument("model")
@text_options(max_seq_len=128, max_tokens=4096)
@click.option(
    "--transfer-tokens",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Tokens to measure layer transfer on, with --lens.",
)
@click.option(
    "--distances",
    is_flag=True,
    help="Also measure the distance of each layer to the next one as of Gaussians: Wasserstein, and with more positions than dimensions KL and "
    "Bhattacharyya.",
)
@click.option("--skip", type=click.IntRange(min=0), default=1, show_default=True, help="Tokens at the start of each sequence to leave out.")
@analysis_options("the similarities of the layers")
def residuals_command(model: str, text: TextOptions, transfer_tokens: int, distances: bool, skip: int, options: AnalysisOptions) -> None:
    """Measure mean, covariance and rogue dimensions of the hidden states of every layer of MODEL.

    With --lens also layer transfer, and the rank correlation of its penalty with the similarity of the covariances. Layer transfer takes 2 L^2 rows
    of the head for each token.
    """
    from metalens import evaluate
    from metalens.analysis import as_json as plain
    from metalens.analysis import residual_report, residual_statistics
    from metalens.lenses.lens import as_lens

    options.check(text.inputs)
    loaded = load_model(model)
    lens = None if options.lens_path is None else as_lens(options.lens_path)
    corpus, settings = text.corpus(loaded), {**text.settings, "show_progress": True}
    statistics = residual_statistics(loaded, corpus, layers=options.layers, skip=skip, max_tokens=text.max_tokens, **settings)
    transfer = None
    if lens is not None:
        transfer = evaluate(loaded, corpus, lens, max_tokens=transfer_tokens, layer_transfer=True, embedding=True, **settings).transfer
    report = residual_report(statistics, transfer, distances=distances, seed=options.seed)
    title = f"hidden states of {model}: {report.tokens} tokens"
    if options.as_json:
        print_json(plain(report) | ({} if transfer is None else {"penalty": transfer.penalty, "penalty_layers": transfer.layers}))
    else:
        from metalens.display.causal_tables import correlation_lines, residuals_table

        print_table(residuals_table(report, title))
        for line in correlation_lines(report):
            note(line)
    from metalens.display.causal_figures import residuals_figure

    options.draw(lambda: residuals_figure(report, transfer, title))
