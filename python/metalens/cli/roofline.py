"""metalens roofline: how fast a lens could be at most on Apple GPUs."""

from __future__ import annotations

from dataclasses import asdict

import click

from metalens.cli.common import json_option, note, one_clear_error, print_json, print_table, renamed_option
from metalens.estimate.chips import CHIPS
from metalens.estimate.kernel_model import fractions
from metalens.estimate.roofline import WHAT, bounds
from metalens.models.facts import dimensions_of
from metalens.models.registry import path_of


@click.command("roofline")
@click.argument("model")
@click.option("--chip", "chips", multiple=True, type=click.Choice(list(CHIPS)), help="Chip to show; may be given several times.  [default: all]")
@renamed_option(
    "--batch-tokens",
    old=["--tokens"],
    default=512,
    show_default=True,
    type=click.IntRange(min=1),
    help="Tokens of a batch. With few tokens, most of the time goes into reading the head.",
)
@json_option
@one_clear_error
def roofline_command(model: str, chips: tuple[str, ...], batch_tokens: int, as_json: bool) -> None:
    """Estimate the maximum speed of a lens on Apple GPUs, in tokens per second. This is a model, not a measurement.

    The estimate comes from counted work and published numbers of the chips. MODEL is a folder with a config.json (its weights are not read), a hub
    id, 'demo', or one of Llama-3.2-1B-4bit, Llama-3.1-8B-4bit, Llama-3.1-70B-4bit. A second table predicts the part of a chip's float32 peak that
    each kernel reaches: with the first design of the kernels, now, and for the same work in plain MLX.
    """
    dimensions = dimensions_of(path_of(model))
    found = {chip: bounds(dimensions, CHIPS[chip], batch_tokens) for chip in chips or CHIPS}
    parts = {chip: fractions(dimensions, CHIPS[chip], batch_tokens) for chip in found}
    if as_json:
        rates = {chip: asdict(bound) for chip, bound in found.items()}
        of_peak = {chip: {kernel: asdict(part) for kernel, part in kernels.items()} for chip, kernels in parts.items()}
        answer = {"note": WHAT, "model": asdict(dimensions), "batch_tokens": batch_tokens, "tokens_per_second": rates, "fraction_of_peak": of_peak}
        print_json(answer)
        return
    from metalens.display.tables import fractions_table, roofline_table

    print_table(roofline_table(found, f"{model}, batches of {batch_tokens} tokens: tokens per second at most"))
    print_table(fractions_table(parts, "Predicted percent of the float32 peak: first design of the kernels > now (plain MLX)"))
    note(WHAT)
