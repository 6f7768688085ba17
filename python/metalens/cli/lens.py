"""metalens lens: what every block would predict after each token of a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from metalens.cli.common import (
    json_option,
    lens_option,
    load_model,
    note,
    one_clear_error,
    parse_layers,
    print_json,
    print_table,
    renamed_option,
    save_option,
)
from metalens.utils.files import require_writable


@click.command("lens")
@click.argument("model")
@click.argument("prompt")
@lens_option
@click.option("--layers", callback=parse_layers, metavar="0,4-7,...", help="Blocks to read.  [default: all]")
@click.option("--top-k", default=3, show_default=True, type=int, help="Number of predictions for each layer and token.")
@json_option
@save_option("the predictions")
@renamed_option(
    "--color",
    old=["--colour"],
    type=click.Choice(["probability", "entropy"]),
    default="probability",
    show_default=True,
    help="Statistic that the color of the picture shows.",
)
@one_clear_error
def lens_command(
    model: str,
    prompt: str,
    lens_path: Path | None,
    layers: list[int] | None,
    top_k: int,
    as_json: bool,
    picture: Path | None,
    color: Literal["probability", "entropy"],
) -> None:
    """Show what every block of MODEL would predict after each token of PROMPT.

    Layer i is the output of block i. Without --lens, the model's own norm and head read every block (the logit lens).
    """
    from metalens import TunedLens

    lens = None if lens_path is None else TunedLens.load(lens_path)
    if picture is not None:
        from metalens.readings.heat_map import picture_format

        picture_format(picture)
        require_writable(picture)
    reading = load_model(model).read(prompt, lens, top_k, layers)
    title = f"{'logit' if lens is None else 'tuned'} lens of {model}"
    if as_json:
        predictions = {str(layer): rows for layer, rows in reading.predictions.items()}
        untranslated = [layer for layer in reading.layers if layer in reading.untranslated]
        print_json({"tokens": reading.tokens, "layers": predictions, "untranslated": untranslated})
    else:
        from metalens.display.tables import reading_table

        print_table(reading_table(reading, title))
    if picture is not None:
        reading.save(picture, color, title)
        note(f"Picture written to {picture}.")
