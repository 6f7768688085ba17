"""metalens convert: between the files of metalens and those of tuned-lens, and from GGUF to mlx-lm's format."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from metalens.cli.common import FilePath, force_option, note, one_clear_error


@click.command("convert")
@click.argument("source", metavar="SOURCE", type=FilePath(path_type=str))
@click.argument("target", metavar="TARGET", type=FilePath())
@click.option("--to", type=click.Choice(["tuned-lens", "metalens"]), help="Format to write.  [default: the one that SOURCE does not have]")
@click.option("--model", help="Path or hub id of the lens's model, for the config.json of tuned-lens.  [default: the model that SOURCE names]")
@click.option("--hub", is_flag=True, hidden=True, help="Deprecated: name the lens hf:ID.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Type of the numbers in tuned-lens's file [default: float32], or of a model's scales and dense numbers [default: chosen by the model].",
)
@force_option
@one_clear_error
def convert_command(
    source: str,
    target: Path,
    to: Literal["tuned-lens", "metalens"] | None,
    model: str | None,
    hub: bool,
    dtype: Literal["float32", "float16", "bfloat16"] | None,
    force: bool,
) -> None:
    """Convert a lens between metalens's two files (SOURCE.npz, SOURCE.json) and tuned-lens's folder (params.pt, config.json).

    SOURCE may also be 'hf:ID', a lens of tuned-lens's collection on the Hugging Face hub.

    When converting to metalens, all translators are written as full matrices, so that mlxterp can load the result.

    If SOURCE is a model in a GGUF file, write it as a folder TARGET that mlx-lm opens. Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q4_K keep their codes; other
    quantized formats are quantized again, to 8 bits. The lines on stderr say what became of each format. With --force, a model of
    an earlier conversion in TARGET is replaced; a folder with other files never is.
    """
    from metalens.models.gguf import convert_gguf, is_gguf

    if is_gguf(source):
        if to or model or hub:
            raise click.UsageError("--to, --model and --hub are for lenses, and SOURCE is a model in a GGUF file.")
        report = convert_gguf(source, target, dtype, force=force)
        for line in (*report.lines(), f"Model written to {report.folder}."):
            note(line)
        return
    from metalens.compat.tuned_lens import convert

    written = convert(source, target, to, model, hub=hub or None, dtype=dtype, force=force)
    note(f"Lens written to {written[0]} and {written[1].name}.")
