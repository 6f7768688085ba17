"""metalens roofline, models, doctor, convert."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click

from metalens.cli.common import note, one_clear_error, print_json, print_table
from metalens.display import tables as report
from metalens.estimate import roofline
from metalens.models import support
from metalens.models.bundled import path_of
from metalens.ops import doctor as diagnosis


@click.command("roofline")
@click.argument("model")
@click.option("--chip", "chips", multiple=True, type=click.Choice(list(roofline.CHIPS)), help="Repeat it for several.  [default: all]")
@click.option(
    "--tokens", default=512, show_default=True, type=click.IntRange(min=1), help="Of a batch; with few, reading the head is what takes time."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@one_clear_error
def roofline_command(model: str, chips: tuple[str, ...], tokens: int, as_json: bool) -> None:
    """Bound a lens's speed on Apple GPUs: tokens per second at most, from counted work and published numbers. A model, not a measurement.

    MODEL is a folder with a config.json (its weights are not read), 'demo', or one of Llama-3.2-1B-4bit, Llama-3.1-8B-4bit, Llama-3.1-70B-4bit.
    """
    found = roofline.dimensions(path_of(model))
    bounds = {chip: roofline.bounds(found, roofline.CHIPS[chip], tokens) for chip in chips or roofline.CHIPS}
    if as_json:
        print_json({"what": roofline.WHAT, "model": vars(found), "tokens": tokens, "tokens per second at most": bounds})
    else:
        print_table(report.roofline_table(bounds, f"{model}, batches of {tokens} tokens: tokens per second at most"))
        note(roofline.WHAT)


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@one_clear_error
def models_command(as_json: bool) -> None:
    """Show which models of the installed mlx-lm a lens can read, and why not others: what the tests found on a tiny model of every kind.

    Whatever the table says, no lens is trained or shown on a model before its norm and head have given the model's own logits.
    """
    found, (version, _) = support.supported_modules(), support.tested()
    if as_json:
        print_json({"tested with mlx-lm": version, "installed": support.installed(), "models": [vars(module) for module in found]})
        return
    print_table(report.support_table(found, f"Models of mlx-lm {support.installed()} (tested with {version})"))
    note(", ".join(f"{n} {status}" for status, n in support.counts(found).items()))


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@one_clear_error
def doctor_command(as_json: bool) -> None:
    """Show which backends and kernels are in use here, and why not others. Exit code 1 if something needs mending."""
    facts = diagnosis.examine()
    if as_json:
        print_json(facts)
    else:
        print_table(report.facts_table({k: v for k, v in facts.items() if k != "problems"}, "metalens doctor"))
        for problem in facts["problems"] or ["Everything works."]:
            note(problem)
    if facts["problems"]:
        sys.exit(1)


@click.command("convert")
@click.argument("source", metavar="SOURCE", type=click.Path())
@click.argument("target", metavar="TARGET", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["tuned-lens", "metalens"]), help="Which kind to write.  [default: what SOURCE is not]")
@click.option("--model", help="Path or hub id of the lens's model, for tuned-lens's config.json.  [default: what SOURCE says]")
@click.option("--hub", is_flag=True, help="SOURCE is the id of a lens in tuned-lens's collection on the Hugging Face hub.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the numbers in tuned-lens's file.",
)
@one_clear_error
def convert_command(
    source: str,
    target: Path,
    to: Literal["tuned-lens", "metalens"] | None,
    model: str | None,
    hub: bool,
    dtype: Literal["float32", "float16", "bfloat16"],
) -> None:
    """Convert a lens between our two files (SOURCE.npz, SOURCE.json) and tuned-lens's folder (params.pt, config.json).

    To metalens every matrix is written whole, whatever variant the lens is: a pair that mlxterp loads too.
    """
    from metalens.compat.tuned_lens import convert

    written = convert(source, target, to, model, hub=hub, dtype=dtype)
    note(f"Lens written to {written[0]} and {written[1].name}.")
