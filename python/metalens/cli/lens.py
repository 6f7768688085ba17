"""metalens lens: what every block would predict after each token of a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from metalens.cli.common import (
    FilePath,
    bos_option,
    embedding_option,
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
from metalens.lenses.opening import files_read
from metalens.readings.export import require_trajectory_output
from metalens.readings.reading import Color, Reading
from metalens.readings.statistics import STATISTICS
from metalens.readings.trajectory import Trajectory
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
@embedding_option
@click.option("--top-k", default=3, show_default=True, type=int, help="Number of predictions for each layer and token.")
@click.option("--ids", is_flag=True, help="PROMPT is token ids, like '1 733 16289'. They are read as they are.")
@click.option("--chat", is_flag=True, help="Put PROMPT into the tokenizer's chat template, as what the user says.")
@bos_option
@click.option(
    "--token",
    "tokens",
    multiple=True,
    metavar="TEXT",
    help="Also show the probability and rank of this token in every layer; with --ids, a token id. Repeat it for more tokens. "
    "Most tokens begin with a space: --token ' Paris'.",
)
@json_option
@save_option("the predictions")
@renamed_option(
    "--color",
    old=["--colour"],
    type=click.Choice(["probability", *(name for name in STATISTICS if name != "log_prob_difference")]),
    default="probability",
    show_default=True,
    help="Statistic that the color of the picture shows.",
)
@click.option(
    "--out",
    type=FilePath(),
    metavar="FILE",
    help="Also write every statistic of the text to FILE.json or FILE.safetensors; metalens.Trajectory.load reads it.",
)
@shard_option()
@force_option
@one_clear_error
def lens_command(
    model: str,
    prompt: str,
    lens_path: Path | None,
    layers: list[int] | None,
    embedding: bool,
    top_k: int,
    ids: bool,
    chat: bool,
    no_bos: bool,
    as_json: bool,
    picture: Path | None,
    tokens: tuple[str, ...],
    color: str,
    out: Path | None,
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
    inputs = [] if lens_path is None else files_read(lens_path)
    with group.together():
        if picture is not None and group.writes:
            from metalens.readings.heat_map import picture_format

            picture_format(picture)
            require_writable(picture)
            require_replaceable([picture_output(picture)], force=force, inputs=inputs)
        if out is not None and group.writes:
            require_writable(require_trajectory_output(out, force=force, inputs=inputs))
    chosen = [*_token_ids(" ".join(tokens))] if ids else list(tokens)
    loaded = load_model(model, group)
    text = given if given is not None else _encoded(loaded, prompt, chat, no_bos)
    compare = out is not None or color in ("kl", "reverse_kl", "agrees")
    trajectory = loaded.trajectory(text, lens, top_k=top_k, layers=layers, embedding=embedding, tokens=chosen, compare=compare)
    reading = Reading(trajectory)
    if not group.writes:
        return
    title = f"{trajectory.lens} of {model}"
    if as_json:
        predictions = {str(layer): rows for layer, rows in reading.predictions.items()}
        untranslated = [layer for layer in reading.layers if layer in reading.untranslated]
        answer = {"tokens": reading.tokens, "layers": predictions, "untranslated": untranslated}
        print_json(answer | ({"chosen": [_chosen(trajectory, i) for i in trajectory.chosen_ids]} if chosen else {}))
    else:
        from metalens.display.tables import chosen_remarks, chosen_table, reading_table

        print_table(reading_table(reading, title))
        if chosen:
            print_table(chosen_table(trajectory, "chosen tokens: probability and rank as the next token"))
            for line in chosen_remarks(trajectory):
                note(line)
    if picture is not None:
        _save_picture(reading, picture, color, title, force)
        note(f"Picture written to {picture}.")
    if out is not None:
        trajectory.save(out, force=force)
        note(f"Statistics written to {out}.")


def _save_picture(reading: Reading, path: Path, color: str, title: str, force: bool) -> None:
    if color in ("probability", "entropy"):
        reading.save(path, cast("Color", color), title, force=force)
        return
    from metalens.readings.heat_map import save_figure

    save_figure(reading.trajectory.plot(color, title), path, force=force)


def _chosen(trajectory: Trajectory, token_id: int) -> dict[str, Any]:
    """Return a chosen token as JSON holds it: its probability and rank by layer, and the first layer that has it on top after the last token."""
    token = trajectory.chosen(token_id)
    rows = {str(layer): row for row, layer in enumerate(trajectory.layers)}
    return {
        "id": token.id,
        "token": token.text,
        "first_on_top": token.first_on_top(),
        "probabilities": {layer: token.probabilities[row].tolist() for layer, row in rows.items()},
        "ranks": {layer: token.ranks[row].tolist() for layer, row in rows.items()},
    }


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
