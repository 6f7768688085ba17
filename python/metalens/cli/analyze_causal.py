"""metalens analyze causal | alignment: whether a lens depends on what the model depends on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metalens.analysis.ablation import MODES, AblationMode
from metalens.cli.analyze_options import AnalysisOptions, analysis_options
from metalens.cli.analyze_text import TextOptions, text_options
from metalens.cli.common import FilePath, SeveralFiles, load_model, note, print_json, print_table

if TYPE_CHECKING:
    import mlx.core as mx

    from metalens.analysis import CausalBasis


@click.command("causal", cls=SeveralFiles)
@click.argument("model")
@text_options(max_seq_len=128, max_tokens=512)
@click.option("--directions", type=click.IntRange(min=1), default=10, show_default=True, help="Directions to find for each layer.")
@click.option("--mode", type=click.Choice(MODES), default="mean", show_default=True, help="What an ablation puts in place of a direction.")
@click.option(
    "--fidelity-tokens",
    type=click.IntRange(min=0),
    default=512,
    show_default=True,
    help="Tokens, after those of --max-tokens, on which the directions are ablated in the running model. 0 = do not run the model again.",
)
@click.option("--max-evaluations", type=click.IntRange(min=1), default=60, show_default=True, help="Limit of evaluations for each direction.")
@click.option(
    "--out",
    type=FilePath(file_okay=False),
    metavar="FOLDER",
    help="Folder for the basis of each layer, written after every direction. A run that was stopped goes on from there.",
)
@analysis_options("energies, influences and their correlation")
def causal_command(
    model: str,
    text: TextOptions,
    directions: int,
    mode: AblationMode,
    fidelity_tokens: int,
    max_evaluations: int,
    out: Path | None,
    options: AnalysisOptions,
) -> None:
    """Find the directions that the lens's predictions depend on, and ablate them in MODEL.

    A direction's energy is the mean KL of the lens's prediction to itself with the direction ablated. If the lens depends on what MODEL depends on,
    both influences have the same order.
    """
    from metalens.analysis import SearchOptions, causal_fidelity, extract_causal_bases
    from metalens.analysis import as_json as plain

    options.check(text.inputs)
    loaded = load_model(model)
    tokens = text.max_tokens or 0
    # Else the first sequence would hold the tokens of the fidelity too.
    both = replace(text, max_seq_len=min(text.max_seq_len, tokens), max_tokens=tokens + fidelity_tokens)
    first, rest = _divided(both.sequences(loaded), tokens)

    def report(basis: CausalBasis) -> None:
        note(f"layer {basis.layer}, direction {len(basis)}: {basis.energies[-1]:.4f} nats per token, {basis.evaluations[-1]} evaluations")

    common: dict[str, Any] = {**both.settings, "max_tokens": None}
    bases = extract_causal_bases(
        loaded,
        first,
        options.lens_path,
        directions=directions,
        layers=options.layers,
        mode=mode,
        options=SearchOptions(max_evaluations=max_evaluations, seed=options.seed),
        folder=out,
        on_direction=report,
        **common,
    )
    if fidelity_tokens and not rest:
        note(f"The text has no tokens after the first {tokens}: the directions are ablated on the text that they were found on.")
    fidelity = []
    if fidelity_tokens:
        fidelity = causal_fidelity(loaded, rest or first, bases, options.lens_path, seed=options.seed, show_progress=True, **common)
    kind = "logit" if options.lens_path is None else "tuned"
    if options.as_json:
        print_json({"bases": [basis.to_dict() for basis in bases.values()], "fidelity": plain(fidelity)})
    else:
        from metalens.display.causal_tables import basis_table

        print_table(basis_table(list(bases.values()), fidelity, f"causal bases of the {kind} lens of {model}"))
    from metalens.display.causal_figures import fidelity_figure

    options.draw(lambda: fidelity_figure(list(bases.values()), fidelity, f"{kind} lens of {model}"))


def _divided(sequences: Sequence[mx.array], tokens: int) -> tuple[list[mx.array], list[mx.array]]:
    """Return the sequences that hold the first `tokens` tokens, at least one, and the others."""
    ends = list(accumulate(ids.size for ids in sequences))
    count = max(1, sum(end <= tokens for end in ends))
    return list(sequences[:count]), list(sequences[count:])


@click.command("alignment", cls=SeveralFiles)
@click.argument("model")
@text_options(max_seq_len=64)
@click.option("--sequences", type=click.IntRange(min=2), default=64, show_default=True, help="Sequences to read: one sample each.")
@click.option("--mean-weights", is_flag=True, help="Weight tokens by the mean of MODEL's predictions before and after, as tuned-lens's v0.0.3 does.")
@analysis_options("the alignment by layer")
def alignment_command(model: str, text: TextOptions, sequences: int, mean_weights: bool, options: AnalysisOptions) -> None:
    """Compare how the lens and MODEL answer to a change of the hidden states (stimulus-response alignment).

    What a block adds at the last token of a sequence is replaced by what it adds in another one. The alignment is the cosine of the change of the
    lens's prediction and of the change of MODEL's, in Aitchison geometry with MODEL's probabilities as weights.
    """
    from metalens.analysis import as_json as plain
    from metalens.analysis import stimulus_response_alignment

    options.check(text.inputs)
    loaded = load_model(model)
    found = stimulus_response_alignment(
        loaded,
        text.corpus(loaded, text.max_seq_len * (sequences + 1)),
        options.lens_path,
        layers=options.layers,
        seq_len=text.max_seq_len,
        max_sequences=sequences,
        bos=not text.no_bos,
        mean_weights=mean_weights,
        seed=options.seed,
        show_progress=True,
    )
    title = f"stimulus-response alignment of {model}"
    if options.as_json:
        print_json({"alignment": plain(found)})
    else:
        from metalens.display.causal_tables import alignment_table

        print_table(alignment_table(found, title))
    from metalens.display.causal_figures import alignment_figure

    options.draw(lambda: alignment_figure(found, title))
