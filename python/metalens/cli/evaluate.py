"""metalens eval: how good a lens is on text, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from metalens.cli.common import (
    DEFAULT_LENGTH,
    FilePath,
    SeveralFiles,
    bos_option,
    data_options,
    force_option,
    json_option,
    lens_option,
    load_model,
    note,
    one_clear_error,
    print_json,
    print_table,
    renamed_option,
    save_option,
    shard_option,
    sharding_group,
    shared_lens,
    sources_of,
)
from metalens.evaluation.results import RESULTS
from metalens.lenses.opening import files_read
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import require_writable
from metalens.utils.outputs import picture_output, require_replaceable

if TYPE_CHECKING:
    from metalens import Evaluation
    from metalens.evaluation import EvaluationText
    from metalens.model import InterpretableModel
    from metalens.training.data.corpus import LossOn

WIDEST_TRANSFER = 24  # layers; a table can't show a wider matrix


@click.command("eval", cls=SeveralFiles)
@click.argument("model")
@lens_option
@data_options(required=True, split="test")
@renamed_option("--max-tokens", old=["--tokens"], type=click.IntRange(min=2), help="Number of tokens to read.  [default: all]")
@click.option("--max-seq-len", type=click.IntRange(min=2), help=f"Tokens per sequence.  {DEFAULT_LENGTH}")
@bos_option
@click.option(
    "--loss-on",
    type=click.Choice(["all", "answers"]),
    default="all",
    show_default=True,
    help="Tokens whose prediction counts: all, or those of the answers in conversations (--field messages).",
)
@click.option("--entropy", is_flag=True, help="Also show the entropy of the predictions in the table.")
@click.option("--logit-stats", is_flag=True, help="Also average the predictions over the text, which gives the bias of each layer.")
@click.option("--embedding", is_flag=True, help="Also measure the embedding's output, and with --lens its translator for it.")
@click.option(
    "--token-shift",
    type=int,
    help="Positions from a prediction to the token that it is scored against, and to whose prediction by MODEL it is compared.  "
    "[default: what the lens was trained for; 1, the next token, for others]",
)
@click.option("--layer-transfer", is_flag=True, help="Also read every layer with every other layer's translator.")
@save_option("the layer transfer, which turns on --layer-transfer", old=["--transfer"])
@click.option(
    "--curves",
    type=FilePath(),
    metavar="PICTURE",
    help="Also save curves of KL, cross-entropy and agreement by layer; with --logit-stats also the bias.",
)
@click.option("--out", type=FilePath(file_okay=False), help=f"Folder for {', '.join(RESULTS)} (the last one only with --logit-stats).")
@shard_option()
@force_option
@json_option
@one_clear_error
def eval_command(
    model: str,
    lens_path: Path | None,
    data: tuple[str, ...],
    field: str,
    split: str,
    max_tokens: int | None,
    max_seq_len: int | None,
    no_bos: bool,
    loss_on: LossOn,
    entropy: bool,
    logit_stats: bool,
    embedding: bool,
    token_shift: int | None,
    layer_transfer: bool,
    picture: Path | None,
    curves: Path | None,
    out: Path | None,
    shard_model: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Compare a tuned lens with the logit lens on the text of --data, layer by layer.

    Scores are in nats per token. Layer i is the output of block i.
    """
    from metalens import evaluate
    from metalens.evaluation import write_results

    layer_transfer = layer_transfer or picture is not None
    if layer_transfer and lens_path is None:
        raise InvalidValueError("Layer transfer (--layer-transfer, --save) needs a tuned lens: give --lens.")
    group = sharding_group(shard_model)
    with group.together():
        if group.writes:
            _require_writable(
                [path for path in (picture, curves) if path is not None], out, force, [*data, *([] if lens_path is None else files_read(lens_path))]
            )
        read = _text(data, field, split, max_tokens, loss_on)
    lens = shared_lens(lens_path, group, whole=layer_transfer)
    loaded = load_model(model, group)
    evaluation = evaluate(
        loaded,
        read(loaded),
        lens,
        max_seq_len=max_seq_len,
        max_tokens=max_tokens,
        bos=not no_bos,
        layer_transfer=layer_transfer,
        logit_stats=logit_stats,
        embedding=embedding,
        token_shift=token_shift,
        show_progress=group.writes,
    )
    if not group.writes:
        return
    if out is not None:
        note(f"Written to {out}/: {', '.join(path.name for path in write_results(evaluation, out, force=force))}.")
    if picture is not None:
        _save_transfer(evaluation, picture, model, force)
    if curves is not None:
        _save_curves(evaluation, curves, model, force)
    if as_json:
        print_json(evaluation.to_dict())
    else:
        _print_tables(evaluation, entropy)


def _require_writable(pictures: Sequence[Path], out: Path | None, force: bool, inputs: Sequence[str | Path]) -> None:
    """Find out before the work whether its results can be written."""
    from metalens.evaluation.results import result_outputs

    require_replaceable(map(picture_output, pictures), force=force, inputs=inputs)
    require_replaceable([] if out is None else result_outputs(out), force=force, inputs=inputs)
    for picture in pictures:
        from metalens.readings.heat_map import picture_format

        picture_format(picture)
        require_writable(picture)
    if out is not None:
        for name in RESULTS:
            require_writable(out / name)


def _text(data: tuple[str, ...], field: str, split: str, max_tokens: int | None, loss_on: LossOn) -> Callable[[InterpretableModel], EvaluationText]:
    """Find the sources of a text, and return a function that reads them for a model."""
    from metalens.training.data import find_sources, open_held_out

    found = find_sources(sources_of(data), field=field, split=split)
    return lambda model: open_held_out(found, model.tokenizer, max_tokens=max_tokens, loss_on=loss_on)


def _save_transfer(evaluation: Evaluation, picture: Path, model: str, force: bool) -> None:
    from metalens.display.figures import transfer_figure
    from metalens.readings.heat_map import save_figure

    if evaluation.transfer is not None:
        save_figure(transfer_figure(evaluation.transfer, f"layer transfer of {model}", len(evaluation.logit)), picture, force=force)
        note(f"Picture written to {picture}.")


def _save_curves(evaluation: Evaluation, picture: Path, model: str, force: bool) -> None:
    from metalens.display.figures import evaluation_figure
    from metalens.readings.heat_map import save_figure

    save_figure(evaluation_figure(evaluation, f"{model}: {evaluation.tokens} tokens"), picture, force=force)
    note(f"Curves written to {picture}.")


def _print_tables(evaluation: Evaluation, entropy: bool) -> None:
    from metalens.display.tables import evaluation_table, transfer_table

    print_table(evaluation_table(evaluation, entropy))
    if evaluation.transfer is None:
        return
    if len(evaluation.transfer.layers) <= WIDEST_TRANSFER:
        print_table(transfer_table(evaluation.transfer, len(evaluation.logit)))
    else:
        note("The matrices of layer transfer are too wide for a table. Use --json, --out or --save.")
