"""metalens lens: what every block would predict after each token of a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from metalens.cli.common import (
    bos_option,
    force_option,
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
    shard_option,
    sharding_group,
    shared_lens,
)
from metalens.lenses.lens_file import lens_files
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import require_writable
from metalens.utils.outputs import picture_output, require_replaceable

if TYPE_CHECKING:
    from metalens.model import InterpretableModel


@click.command("lens")
@click.argument("model")
@click.argument("prompt")
@lens_option
@click.option("--layers", callback=parse_layers, metavar="0,4-7,...", help="Blocks to read.  [default: all]")
@click.option("--top-k", default=3, show_default=True, type=int, help="Number of predictions for each layer and token.")
@click.option("--ids", is_flag=True, help="PROMPT is token ids, like '1 733 16289'. They are read as they are.")
@click.option("--chat", is_flag=True, help="Put PROMPT into the tokenizer's chat template, as what the user says.")
@bos_option
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
@shard_option()
@force_option
@one_clear_error
def lens_command(
    model: str,
    prompt: str,
    lens_path: Path | None,
    layers: list[int] | None,
    top_k: int,
    ids: bool,
    chat: bool,
    no_bos: bool,
    as_json: bool,
    picture: Path | None,
    color: Literal["probability", "entropy"],
    shard_model: bool,
    force: bool,
) -> None:
    """Show what every block of MODEL would predict after each token of PROMPT.

    Layer i is the output of block i. Without --lens, the model's own norm and head read every block (the logit lens).
    """
    if ids + chat + no_bos > 1:
        raise InvalidValueError("--ids, --chat and --no-bos exclude each other: ids and chat templates have their own special tokens.")
    given = _token_ids(prompt) if ids else None
    group = sharding_group(shard_model)
    lens = shared_lens(lens_path, group, whole=False)
    with group.together():
        if picture is not None and group.writes:
            from metalens.readings.heat_map import picture_format

            picture_format(picture)
            require_writable(picture)
            require_replaceable([picture_output(picture)], force=force, inputs=[] if lens_path is None else lens_files(lens_path))
    loaded = load_model(model, group)
    reading = loaded.read(given if given is not None else _encoded(loaded, prompt, chat, no_bos), lens, top_k, layers)
    if not group.writes:
        return
    title = f"{'logit' if lens is None else 'tuned'} lens of {model}"
    if as_json:
        predictions = {str(layer): rows for layer, rows in reading.predictions.items()}
        untranslated = [layer for layer in reading.layers if layer in reading.untranslated]
        print_json({"tokens": reading.tokens, "layers": predictions, "untranslated": untranslated})
    else:
        from metalens.display.tables import reading_table

        print_table(reading_table(reading, title))
    if picture is not None:
        reading.save(picture, color, title, force=force)
        note(f"Picture written to {picture}.")


def _token_ids(prompt: str) -> list[int]:
    """Return the token ids that a prompt spells, with spaces or commas between them."""
    try:
        return [int(part) for part in prompt.replace(",", " ").split()]
    except ValueError:
        raise InvalidValueError(f"With --ids the prompt must be token ids like '1 733 16289', got {prompt!r:.80}.") from None


def _encoded(model: InterpretableModel, prompt: str, chat: bool, no_bos: bool) -> str | list[int]:
    """Return a prompt as `read` takes it."""
    if chat:
        return model.encode_chat(prompt)
    return model.encode(prompt, bos=False) if no_bos else prompt
