"""metalens eval, lens, demo: what a lens says, and how well."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console

from metalens.cli import demo as demonstration
from metalens.cli.common import (
    DEFAULT_LENGTH,
    SeveralFiles,
    load_model,
    note,
    one_clear_error,
    parse_layers,
    print_json,
    print_table,
    sources_of,
)
from metalens.display import tables as report
from metalens.evaluation import EvaluationText, evaluate, write_results
from metalens.lenses.lens import TunedLens
from metalens.models.bundled import NAME
from metalens.readings.heat_map import lens_figure, picture_format, save_figure
from metalens.readings.reading import Reading
from metalens.training.data import documents, find_sources, open_corpus
from metalens.training.data.readers import TextFile
from metalens.utils.arrays import to_list
from metalens.utils.errors import InvalidValueError
from metalens.utils.files import atomic_write, require_writable

RESULTS = ("evaluation.json", "aggregate_metrics.json", "logit_stats.npz")
WIDEST_TRANSFER = 24  # layers whose matrix a table can show


def write_picture(reading: Reading, path: Path, title: str, color: str) -> None:
    """The heat map of a reading, the model's own answer on top."""
    if color == "probability":
        values, of_model, name = reading.stats.max_probability, reading.model.max_probability, "probability of the top token"
    else:
        values, of_model, name = reading.stats.entropy, reading.model.entropy, "entropy (nats)"
    figure = lens_figure(
        reading.predictions,
        reading.tokens,
        values,
        name,
        title=title,
        model_row=(reading.model_tokens, to_list(of_model[0])),
        max_display_tokens=24,
        # Bright is certain in both. Probabilities share one scale, so that two pictures compare.
        cmap="viridis" if color == "probability" else "viridis_r",
        limits=(0.0, 1.0) if color == "probability" else None,
    )
    save_figure(figure, path)


@click.command("eval", cls=SeveralFiles)
@click.argument("model")
@click.option("--lens", "lens_path", type=click.Path(path_type=Path), help="As written by train.  [default: the logit lens alone]")
@click.option(
    "--data", required=True, multiple=True, metavar="FILE...", help="UTF-8 text, JSON Lines or Parquet; also several, folders, or hf:DATASET."
)
@click.option("--field", default="text", show_default=True, help="Field or column with the text.")
@click.option("--split", default="test", show_default=True, help="Of hub data sets.")
@click.option("--tokens", type=click.IntRange(min=2), help="Read only this many tokens.  [default: all]")
@click.option("--max-seq-len", type=click.IntRange(min=2), help=f"Tokens per sequence.  {DEFAULT_LENGTH}")
@click.option("--entropy", is_flag=True, help="Show the entropy of the predictions in the table too.")
@click.option("--logit-stats", is_flag=True, help="Also average the predictions over the text, for the bias of each layer.")
@click.option("--layer-transfer", is_flag=True, help="Also read every layer with every other layer's translator.")
@click.option("--transfer", "picture", type=click.Path(path_type=Path), metavar="PICTURE", help="--layer-transfer as a heat map, e.g. out.png.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help=f"A folder for {', '.join(RESULTS)} (with --logit-stats).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@one_clear_error
def eval_command(
    model: str,
    lens_path: Path | None,
    data: tuple[str, ...],
    field: str,
    split: str,
    tokens: int | None,
    max_seq_len: int | None,
    entropy: bool,
    logit_stats: bool,
    layer_transfer: bool,
    picture: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Compare the tuned lens with the logit lens, layer by layer (nats per token; layer i is the output of block i)."""
    layer_transfer = layer_transfer or picture is not None
    if layer_transfer and lens_path is None:
        raise InvalidValueError("--layer-transfer and --transfer need a tuned lens: give --lens.")
    if picture is not None:
        picture_format(picture)
        require_writable(picture)
    if out is not None:
        for name in RESULTS:
            require_writable(out / name)
    lens = None if lens_path is None else TunedLens.load(lens_path)
    sources = sources_of(data)
    found = find_sources(sources, field=field, split=split)
    # One plain text is read as it is; anything else is joined as `train` does.
    text: EvaluationText | None = next(documents(found)) if len(found) == 1 and isinstance(found[0], TextFile) else None
    loaded = load_model(model)
    evaluation = evaluate(
        loaded,
        open_corpus(sources, loaded.tokenizer, field=field, split=split, max_tokens=tokens) if text is None else text,
        lens,
        max_seq_len=max_seq_len,
        max_tokens=tokens,
        layer_transfer=layer_transfer,
        logit_stats=logit_stats,
        show_progress=True,
    )
    if out is not None:
        note(f"Written to {out}/: {', '.join(path.name for path in write_results(evaluation, out))}.")
    if picture is not None and evaluation.transfer is not None:
        save_figure(report.transfer_figure(evaluation.transfer, f"layer transfer of {model}"), picture)
        note(f"Picture written to {picture}.")
    if as_json:
        print_json(evaluation.to_dict())
        return
    print_table(report.evaluation_table(evaluation, entropy))
    if evaluation.transfer is not None and len(evaluation.transfer.ce) <= WIDEST_TRANSFER:
        print_table(report.transfer_table(evaluation.transfer))
    elif evaluation.transfer is not None:
        note("The matrices of layer transfer are too wide for a table: --json, --out and --transfer have them.")


@click.command("lens")
@click.argument("model")
@click.argument("prompt")
@click.option("--lens", "lens_path", type=click.Path(path_type=Path), help="A tuned lens.  [default: the logit lens]")
@click.option("--layers", callback=parse_layers, metavar="0,4-7,...", help="Which blocks.  [default: all]")
@click.option("--top-k", default=3, show_default=True, type=int, help="Predictions per layer and token.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--save", type=click.Path(path_type=Path), help="Also write a heat map, e.g. out.png.")
@click.option(
    "--color", "--colour", type=click.Choice(["probability", "entropy"]), default="probability", show_default=True, help="What the heat map shows."
)
@one_clear_error
def lens_command(
    model: str, prompt: str, lens_path: Path | None, layers: list[int] | None, top_k: int, as_json: bool, save: Path | None, color: str
) -> None:
    """Show what every block of MODEL would predict after each token of PROMPT."""
    lens = None if lens_path is None else TunedLens.load(lens_path)
    if save is not None:
        picture_format(save)
        require_writable(save)
    reading = load_model(model).read(prompt, lens, top_k, layers)
    title = f"{'logit' if lens is None else 'tuned'} lens of {model}"
    if as_json:
        print_json({"tokens": reading.tokens, "layers": {str(layer): rows for layer, rows in reading.predictions.items()}})
    else:
        print_table(report.reading_table(reading, title))
    if save is not None:
        write_picture(reading, save, title, color)
        note(f"Picture written to {save}.")


@click.command("demo")
@click.option(
    "--out", default="demo_output", show_default=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for lens, tables and pictures."
)
@one_clear_error
def demo_command(out: Path) -> None:
    """Train a lens for the bundled model on the bundled text, and show that it beats the logit lens on held-out text."""
    require_writable(out / "lens.npz")
    result = demonstration.run(load_model(NAME), show_progress=True)
    result.lens.save(out / "lens")
    with atomic_write(out / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(result.evaluation.to_dict(), indent=2) + "\n")
    table = report.evaluation_table(result.evaluation)
    with atomic_write(out / "evaluation.txt") as temporary, temporary.open("w", encoding="utf-8") as file:
        Console(file=file, width=120).print(table)
    print_table(table)
    for name, reading in (("logit", result.logit), ("tuned", result.tuned)):
        title = f"{name} lens: what each layer would say next"
        print_table(report.reading_table(reading, title))
        write_picture(reading, out / f"{name}_lens.png", title, "probability")
    note(f"Lens, evaluation and pictures are in {out}/. Try: metalens lens demo 'Your prompt' --lens {out}/lens")
