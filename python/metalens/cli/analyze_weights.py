"""metalens analyze weights: what the rows of a block's output matrices promote and suppress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from metalens.cli.analyze_options import AnalysisOptions, analysis_options
from metalens.cli.common import FilePath, load_model, note, print_json, print_table
from metalens.utils.errors import InvalidValueError

if TYPE_CHECKING:
    from metalens.model import InterpretableModel

ORDERS = ("coherence", "size", "cosine", "probability", "mass")


def _parse_rows(_: click.Context, __: click.Parameter, value: str | None) -> range | None:
    """Read a range of rows: '0-99'."""
    if value is None:
        return None
    first, dash, last = value.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or int(first) > int(last or first):
        raise click.BadParameter(f"{value!r} is no range of rows like 0-99.")
    return range(int(first), int(last or first) + 1)


def _words_of(file: Path | None, model: InterpretableModel) -> list[int]:
    """Return the tokens of the words in a file, and say how many words are none (InvalidValueError if all are none)."""
    if file is None:
        return []
    from metalens.analysis import concept_tokens

    words = file.read_text(encoding="utf-8").splitlines()
    found, left_out = concept_tokens(model, words)
    if left_out:
        shown = ", ".join(map(repr, left_out[:5]))
        note(f"{len(left_out)} of {len(words)} lines are no single token of this model, and left out: {shown}{', ...' if len(left_out) > 5 else ''}.")
    if not found:
        raise InvalidValueError(f"No line of {file} is a single token of this model, with or without a space before it.")
    return found


@click.command("weights")
@click.argument("model")
@click.option(
    "--matrix",
    default="mlp",
    show_default=True,
    help="Output matrix of a block: mlp, attention, the dotted path of another one; or ov, the circuits of the attention heads.",
)
@click.option("--rows", callback=_parse_rows, metavar="FIRST-LAST", help="Rows of each matrix to read, like 0-99.  [default: all]")
@click.option("--top-k", default=10, show_default=True, type=click.IntRange(min=2), help="Tokens to keep of each row.")
@click.option("--show", default=5, show_default=True, type=click.IntRange(min=1), help="Rows of each matrix to show.")
@click.option("--by", type=click.Choice(ORDERS), help="What the shown rows have most of.  [default: coherence; with --token or --tokens-file mass]")
@click.option(
    "--token",
    "tokens",
    multiple=True,
    metavar="TEXT",
    help="Also show the probability of this token in each row. With several it is that of all together. Most tokens begin with a space.",
)
@click.option(
    "--tokens-file",
    type=FilePath(exists=True, dir_okay=False),
    help="File with the words of a concept, one a line: each as it stands and with a space before it, where that is one token.",
)
@click.option("--baseline", is_flag=True, help="Also read as many random directions, and say how often a row's tokens are more alike than theirs.")
@analysis_options(None)
def weights_command(
    model: str,
    matrix: str,
    rows: range | None,
    top_k: int,
    show: int,
    by: str | None,
    tokens: tuple[str, ...],
    tokens_file: Path | None,
    baseline: bool,
    options: AnalysisOptions,
) -> None:
    """Read what the rows of a block's output matrix promote and suppress, through the logit lens or --lens.

    Packed matrices are unpacked a few rows at a time. The coherence of a row is how alike its most promoted tokens are, its mass the probability
    of the tokens of --token and --tokens-file together.
    """
    from metalens.analysis import as_json as plain
    from metalens.analysis import coherence_auroc, random_directions, read_directions, read_weights

    (lens,) = list(options.lenses().values())[-1:]
    loaded = load_model(model)
    concept: list[str | int] = [*tokens, *_words_of(tokens_file, loaded)]
    by, answers = by or ("mass" if concept else "coherence"), []
    if by == "mass" and not concept:
        raise InvalidValueError("--by mass needs the tokens whose probability it is: give --token or --tokens-file.")
    for reading in read_weights(loaded, lens, which=matrix, layers=options.layers, rows=rows, top_k=top_k, tokens=concept):
        strongest = reading.strongest(show, by)
        found = None
        if baseline:
            random = read_directions(loaded, random_directions(loaded, len(reading), options.seed), reading.layer, lens, top_k=top_k)
            found = coherence_auroc(reading, random, seed=options.seed)
        if options.as_json:
            answers.append(reading.to_dict(strongest) | ({} if found is None else {"auroc": plain(found)}))
            continue
        from metalens.display.format import interval
        from metalens.display.prediction_tables import weight_table

        print_table(weight_table(reading, strongest, f"{model}: {reading.path} of block {reading.layer}, {reading.lens}"))
        if found is not None:
            note(f"A row is more coherent than a random direction in {interval(found)} of the pairs.")
    if options.as_json:
        print_json(answers)
