"""metalens lenses: the lenses of tuned-lens's collection on the hub."""

from __future__ import annotations

import click

from metalens.cli.common import json_option, note, one_clear_error, print_json


@click.command("lenses")
@click.option("--cached", is_flag=True, help="List the lenses in the hub's cache on this machine instead, which needs no network.")
@json_option
@one_clear_error
def lenses_command(cached: bool, as_json: bool) -> None:
    """List the lenses of tuned-lens's collection on the Hugging Face hub. --lens hf:ID reads one.

    TUNED_LENS_REPO_ID and TUNED_LENS_REPO_TYPE name another repository.
    """
    from metalens.lenses.hub import available_lenses, cached_lenses

    if not cached:
        ids = available_lenses()
        print_json({"lenses": ids}) if as_json else click.echo("\n".join(f"hf:{name}" for name in ids))
        return
    found = cached_lenses()
    if as_json:
        print_json({"cached": [{**vars(each), "folder": str(each.folder)} for each in found]})
        return
    for each in found:
        named = f", {', '.join(each.revisions)}" if each.revisions else ""
        click.echo(f"hf:{each.lens_id}@{each.commit} ({each.folder}{named})")
    if not found:
        note("The hub's cache on this machine has no lens.")
