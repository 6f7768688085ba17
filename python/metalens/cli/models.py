"""metalens models: the models that lenses support."""

from __future__ import annotations

import click

from metalens.cli.common import json_option, note, one_clear_error, print_json, print_table


@click.command("models")
@json_option
@one_clear_error
def models_command(as_json: bool) -> None:
    """List the models of the installed mlx-lm, whether a lens can read them, and why not.

    The list comes from tests on a tiny model of every kind. Whatever it says, no lens is trained or shown on a model whose norm and head have not
    reproduced the model's own logits.

    The last lines name models that PyPI packages carry. A command that loads one of them downloads it once.
    """
    from metalens.models import support
    from metalens.models.registry import PACKAGED

    found, (version, _), installed = support.supported_modules(), support.tested(), support.installed()
    if as_json:
        print_json({"tested_mlx_lm": version, "installed_mlx_lm": installed, "models": [vars(module) for module in found]})
        return
    from metalens.display.tables import support_table

    print_table(support_table(found, f"Models of mlx-lm {installed} (tested with {version})"))
    note(", ".join(f"{n} {status}" for status, n in support.counts(found).items()))
    for model in PACKAGED.values():
        note(f"{model.name}: {model.title}, {model.megabytes} MB from PyPI, license: {model.license}")
