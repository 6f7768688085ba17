"""metalens plan: what a training run would need."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import click

from metalens.cli.common import (
    SeveralFiles,
    data_options,
    json_option,
    note,
    one_clear_error,
    parallel_of,
    parallel_option,
    print_json,
    print_table,
    sources_of,
    start_option,
)
from metalens.cli.settings import given_settings, training_options


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
@start_option
@training_options
@parallel_option
@click.option("--processes", default=1, show_default=True, type=click.IntRange(min=1), help="Number of processes that mlx.launch would start.")
@click.option(
    "--memory",
    type=float,
    callback=parse_gigabytes,
    metavar="GB",
    help="Memory that each process may use, in gigabytes.  [default: the memory of this machine]",
)
@json_option
@one_clear_error
def plan_command(
    model: str,
    data: tuple[str, ...],
    field: str,
    split: str,
    start_from: Path | None,
    recipe: str | None,
    config_file: Path | None,
    parallel: Literal["data", "layers"] | None,
    shard_model: bool,
    processes: int,
    memory: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Estimate what `train` would need with the same options, without loading the model: memory, work, time, text and disk.

    The time is that of this machine, from a probe of about a second. If the run does not fit into the memory, the estimate lists changes that would
    make it fit. MODEL is a folder with a config.json (the estimate is better if it has weights too), a hub id, 'demo', one of Llama-3.2-1B-4bit,
    Llama-3.1-8B-4bit, Llama-3.1-70B-4bit, or, if it was loaded before, a GGUF file, 'smollm2' or 'gemma3-270m'.
    """
    from metalens.estimate.memory import plan

    found = plan(
        model,
        recipe,
        config=config_file,
        memory=memory,
        processes=processes,
        parallel=parallel_of(parallel, shard_model),
        shard_model=shard_model,
        data=sources_of(data) if data else None,
        field=field,
        split=split,
        measure=True,
        start_from=start_from,
        **given_settings(options),
    )
    if as_json:
        print_json({"model": model, **found.to_dict()})
        return
    from metalens.display.tables import plan_remarks, plan_table

    print_table(plan_table(found, f"{model}, recipe {found.recipe}"))
    for line in plan_remarks(found):
        note(line)
