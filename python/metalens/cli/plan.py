"""metalens plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from metalens.cli.common import SeveralFiles, note, one_clear_error, print_json, print_table, sources_of
from metalens.cli.settings import config_of, data_options, parallel_option, training_options
from metalens.display import tables as report
from metalens.estimate import memory as planning
from metalens.models.bundled import path_of
from metalens.models.facts import facts_of
from metalens.training.data import find_sources


@click.command("plan", cls=SeveralFiles)
@click.argument("model")
@data_options(required=False)
@training_options
@parallel_option
@click.option("--processes", default=1, show_default=True, type=click.IntRange(min=1), help="That mlx.launch would start.")
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), metavar="GB", help="Of each process's machine.  [default: this one's]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
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
    memory: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what `train` with the same options would take: memory, work and text, and what to change if it does not fit. Loads no weights.

    MODEL is a folder with a config.json (weights make the numbers better), a hub id, 'demo', or one of Llama-3.2-1B-4bit, Llama-3.1-8B-4bit,
    Llama-3.1-70B-4bit.
    """
    facts = facts_of(path_of(model))
    name, config = config_of(recipe, config_file, options, facts.context)
    available = None if memory is None else round(memory * 1e9)
    text_bytes = planning.text_bytes(find_sources(sources_of(data), field=field, split=split)) if data else None
    found = planning.plan(facts, config, available=available, processes=processes, share=parallel, text_bytes=text_bytes)
    if as_json:
        print_json({"model": model, "recipe": name, **found.to_dict()})
        return
    print_table(report.plan_table(found, f"{model}, recipe {name}"))
    for line in found.remarks:
        note(line)
