"""metalens plan: what a training run would need."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import click

from metalens.cli.common import JSON, PARALLEL, SeveralFiles, data_options, note, one_clear_error, print_json, print_table, sources_of
from metalens.cli.settings import config_of, training_options


def parse_gigabytes(_: click.Context, __: click.Parameter, value: float | None) -> int | None:
    """Return gigabytes as bytes."""
    if value is None:
        return None
    count = value * 1e9
    if not math.isfinite(count) or count < 1:
        raise click.BadParameter(f"{value} is not a number of gigabytes above 0.")
    return round(count)


@click.command("plan", cls=SeveralFiles)
@click.argument("model")
@data_options(required=False)
@training_options
@PARALLEL
@click.option("--processes", default=1, show_default=True, type=click.IntRange(min=1), help="Number of processes that mlx.launch would start.")
@click.option(
    "--memory",
    type=float,
    callback=parse_gigabytes,
    metavar="GB",
    help="Memory that each process may use, in gigabytes.  [default: the memory of this machine]",
)
@JSON
@one_clear_error
def plan_command(
    model: str,
    data: tuple[str, ...],
    field: str,
    split: str,
    recipe: str | None,
    config_file: Path | None,
    parallel: Literal["data", "layers"],
    processes: int,
    memory: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Estimate what `train` would need with the same options, without loading the model: memory, work, text and disk.

    If the run does not fit, the estimate lists changes that would make it fit. MODEL is a folder with a config.json (the estimate is better if it has
    weights too), a hub id, 'demo', or one of Llama-3.2-1B-4bit, Llama-3.1-8B-4bit, Llama-3.1-70B-4bit.
    """
    from metalens.estimate.memory import plan
    from metalens.models.bundled import path_of
    from metalens.models.facts import facts_of

    facts = facts_of(path_of(model))
    name, config = config_of(recipe, config_file, options, facts.context_length)
    sources = sources_of(data) if data else None
    found = plan(facts, config, memory=memory, processes=processes, parallel=parallel, data=sources, field=field, split=split)
    if as_json:
        print_json({"model": model, "recipe": name, **found.to_dict()})
        return
    from metalens.display.tables import plan_remarks, plan_table

    print_table(plan_table(found, f"{model}, recipe {name}"))
    for line in plan_remarks(found):
        note(line)
