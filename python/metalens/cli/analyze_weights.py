"""metalens analyze weights: what the rows of a block's output matrices promote and suppress."""

from __future__ import annotations

from pathlib import Path

import click

from metalens.cli.analyze_options import layers_option, opened_lenses, seed_option
from metalens.cli.common import json_option, lens_option, load_model, note, one_clear_error, print_json, print_table

ORDERS = ("coherence", "size", "cosine", "probability")


def _parse_rows(_: click.Context, __: click.Parameter, value: str | None) -> range | None:
    """Read a range of rows: '0-99'."""
    if value is None:
        return None
    first, dash, last = value.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or int(first) > int(last or first):
        raise click.BadParameter(f"{value!r} is no range of rows like 0-99.")
    return range(int(first), int(last or first) + 1)


@click.command("weights")
@click.argument("model")
@lens_option
@click.option(
    "--matrix",
    default="mlp",
    show_default=True,
    help="Output matrix of a block: mlp, attention, the dotted path of another one; or ov, the circuits of the attention heads.",
)
@layers_option
@click.option("--rows", callback=_parse_rows, metavar="FIRST-LAST", help="Rows of each matrix to read, like 0-99.  [default: all]")
@click.option("--top-k", default=10, show_default=True, type=click.IntRange(min=2), help="Tokens to keep of each row.")
@click.option("--show", default=5, show_default=True, type=click.IntRange(min=1), help="Rows of each matrix to show.")
@click.option("--by", type=click.Choice(ORDERS), default="coherence", show_default=True, help="What the shown rows have most of.")
@click.option("--baseline", is_flag=True, help="Also read as many random directions, and say how often a row's tokens are more alike than theirs.")
@seed_option
@json_option
@one_clear_error
def weights_command(
    model: str,
    lens_path: Path | None,
    matrix: str,
    layers: list[int] | None,
    rows: range | None,
    top_k: int,
    show: int,
    by: str,
    baseline: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Read what the rows of a block's output matrix promote and suppress, through the logit lens or --lens.

    Packed matrices are unpacked a few rows at a time. The coherence of a row is how alike its most promoted tokens are.
    """
    from metalens.analysis import as_json as plain
    from metalens.analysis import coherence_auroc, random_directions, read_directions, read_weights

    (lens,) = list(opened_lenses(lens_path).values())[-1:]
    loaded = load_model(model)
    answers = []
    for reading in read_weights(loaded, lens, which=matrix, layers=layers, rows=rows, top_k=top_k):
        strongest = reading.strongest(show, by)
        found = None
        if baseline:
            random = read_directions(loaded, random_directions(loaded, len(reading), seed), reading.layer, lens, top_k=top_k)
            found = coherence_auroc(reading, random, seed=seed)
        if as_json:
            answers.append(reading.to_dict(strongest) | ({} if found is None else {"auroc": plain(found)}))
            continue
        from metalens.display.format import interval
        from metalens.display.prediction_tables import weight_table

        print_table(weight_table(reading, strongest, f"{model}: {reading.path} of block {reading.layer}, {reading.lens}"))
        if found is not None:
            note(f"A row is more coherent than a random direction in {interval(found)} of the pairs.")
    if as_json:
        print_json(answers)
