"""metalens analyze layers | residuals: what each block does to the predictions, and what its hidden states look like."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from metalens.analysis.changed_layers import CHANGES
from metalens.cli.analyze_options import check_picture, layers_option, seed_option, write_picture
from metalens.cli.analyze_text import opened_text, text_options
from metalens.cli.common import (
    SeveralFiles,
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


@click.command("layers", cls=SeveralFiles)
@click.argument("model")
@text_options(max_seq_len=128, max_tokens=512)
@layers_option
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
@lens_option
@seed_option
@save_option("the effects by layer")
@force_option
@json_option
@one_clear_error
def layers_command(
    model: str,
    data: tuple[str, ...],
    field: str,
    split: str,
    max_tokens: int,
    max_seq_len: int,
    no_bos: bool,
    layers: list[int] | None,
    changes: tuple[str, ...],
    gradient: Literal["lens", "model"] | None,
    lens_path: Path | None,
    seed: int,
    picture: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Delete, swap and replace blocks of MODEL one at a time, and measure what that does to its predictions."""
    from metalens.analysis import as_json as plain
    from metalens.analysis import gradient_alignment, layer_effects, sequences_of

    if lens_path is not None and gradient != "lens":
        raise InvalidValueError(
            "--lens is only for --gradient lens: the changes compare MODEL with itself. Leave --lens out, or add --gradient lens."
        )

    check_picture(picture, force, [Path(name) for name in data], lens_path)
    loaded = load_model(model)
    text = sequences_of(loaded, opened_text(loaded, data, field, split, max_tokens), max_seq_len=max_seq_len, max_tokens=max_tokens, bos=not no_bos)
    effects = layer_effects(loaded, text, changes, layers=layers, max_seq_len=max_seq_len, bos=not no_bos, seed=seed, show_progress=True)
    gradients = (
        gradient_alignment(loaded, text, lens_path, of=gradient, max_seq_len=max_seq_len, bos=not no_bos, seed=seed, show_progress=True)
        if gradient
        else []
    )
    title = f"changed blocks of {model}"
    if as_json:
        print_json({"layers": plain(effects), "gradient": plain(gradients)})
    else:
        from metalens.display.causal_tables import layers_table

        print_table(layers_table(effects, gradients, title))
    if picture is not None:
        from metalens.display.causal_figures import layers_figure

        write_picture(layers_figure(effects, gradients, title), picture, force)


@click.command("residuals", cls=SeveralFiles)
@click.argument("model")
@text_options(max_seq_len=512, max_tokens=4096)
@lens_option
@layers_option
@click.option(
    "--transfer-tokens",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Tokens to measure layer transfer on, with --lens.",
)
@click.option("--skip", type=click.IntRange(min=0), default=1, show_default=True, help="Tokens at the start of each sequence to leave out.")
@seed_option
@save_option("the similarities of the layers")
@force_option
@json_option
@one_clear_error
def residuals_command(
    model: str,
    data: tuple[str, ...],
    field: str,
    split: str,
    max_tokens: int,
    max_seq_len: int,
    no_bos: bool,
    lens_path: Path | None,
    layers: list[int] | None,
    transfer_tokens: int,
    skip: int,
    seed: int,
    picture: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure mean, covariance and rogue dimensions of the hidden states of every layer of MODEL.

    With --lens also layer transfer, and the rank correlation of its penalty with the similarity of the covariances. Layer transfer takes 2 L^2 rows
    of the head for each token.
    """
    from metalens import evaluate
    from metalens.analysis import as_json as plain
    from metalens.analysis import residual_report, residual_statistics
    from metalens.lenses.lens import as_lens, untranslated_layers

    check_picture(picture, force, [Path(name) for name in data], lens_path)
    loaded = load_model(model)
    lens = None if lens_path is None else as_lens(lens_path)
    text = opened_text(loaded, data, field, split, max_tokens)
    statistics = residual_statistics(
        loaded, text, layers=layers, skip=skip, max_seq_len=max_seq_len, max_tokens=max_tokens, bos=not no_bos, show_progress=True
    )
    transfer, translated = None, None
    if lens is not None:
        measured = evaluate(
            loaded, text, lens, max_seq_len=max_seq_len, max_tokens=transfer_tokens, bos=not no_bos, layer_transfer=True, show_progress=True
        )
        transfer = measured.transfer
        translated = [layer for layer in range(loaded.num_layers) if layer not in untranslated_layers(lens)]
    report = residual_report(statistics, transfer, transfer_layers=translated, seed=seed)
    title = f"hidden states of {model}: {report.tokens} tokens"
    if as_json:
        print_json(plain(report) | ({} if transfer is None else {"penalty": transfer.penalty}))
    else:
        from metalens.display.causal_tables import correlation_lines, residuals_table

        print_table(residuals_table(report, title))
        for line in correlation_lines(report):
            note(line)
    if picture is not None:
        from metalens.display.causal_figures import residuals_figure

        write_picture(residuals_figure(report, transfer, title), picture, force)
