"""Tables of an evaluation: scores by layer, layer transfer, and a lens beside the closed form that it began with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.table import Table

from metalens.display.format import decimals, percent
from metalens.evaluation import Evaluation, Transfer
from metalens.evaluation.results import shift_remark
from metalens.evaluation.transfer import translated_remark
from metalens.models.layers import EMBEDDING, Layer, layers_in_order
from metalens.utils.errors import InvalidValueError

# {field of Scores: (heading, format)}
SCORE_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "kl": ("KL", decimals),
    "ce": ("CE", decimals),
    "bits_per_byte": ("bits/byte", decimals),
    "top1": ("top-1", percent),
    "entropy": ("entropy", decimals),
    "bias": ("bias", decimals),
}
MODEL_COLUMNS = ("ce", "bits_per_byte", "entropy")  # the others compare with the model


def evaluation_table(evaluation: Evaluation, entropy: bool = False) -> Table:
    """Make a table with a row for each layer, and the logit lens and the tuned lens side by side.

    Columns are the KL to the model, the cross-entropy, bits per byte and the agreement with the model's top token.

    Args:
        evaluation: the evaluation. If it has logit_stats, the table shows the bias of each layer too.
        entropy: also show the entropy of the predictions.
    """
    biases = evaluation.bias
    names = ["kl", "ce", "bits_per_byte", "top1"]
    if entropy:
        names.append("entropy")
    if biases is not None:
        names.append("bias")
    lenses = ["logit"] if evaluation.tuned is None else ["logit", "tuned"]
    table = Table(title=f"{evaluation.tokens} tokens; {_nats(names)} in nats per token")
    table.add_column("layer", justify="right")
    for lens in lenses:
        for name in names:
            table.add_column(f"{lens} lens\n{SCORE_COLUMNS[name][0]}", justify="right")
    errors = {(lens, name): evaluation.standard_errors(lens, name) for lens in lenses for name in ("kl", "ce")}
    if evaluation.embedding is not None:
        errors |= {(f"{lens} {EMBEDDING}", name): evaluation.standard_errors(f"{lens} {EMBEDDING}", name) for lens in lenses for name in ("kl", "ce")}

    def cell(lens: str, layer: Layer, name: str) -> str:
        scores, key, row = evaluation.scores(lens, layer), f"{lens} {EMBEDDING}" if layer == EMBEDDING else lens, 0 if layer == EMBEDDING else layer
        if scores is None:
            return "-"
        value = biases[key][row] if name == "bias" and biases is not None else getattr(scores, name)
        error = errors.get((key, name))
        return SCORE_COLUMNS[name][1](value) + ("" if error is None else f" ±{decimals(error[row])}")

    for layer in layers_in_order(len(evaluation.logit), evaluation.embedding is not None):
        table.add_row(str(layer), *(cell(lens, layer, name) for lens in lenses for name in names))
    table.add_section()
    translated = evaluation.translated

    def mean(lens: str, name: str) -> str:
        of_lens = evaluation.logit if lens == "logit" or evaluation.tuned is None else evaluation.tuned
        values = biases[lens] if name == "bias" and biases is not None else [getattr(scores, name) for scores in of_lens]
        return SCORE_COLUMNS[name][1](sum(values[i] for i in translated) / len(translated))

    if translated:
        table.add_row("mean", *(mean(lens, name) for lens in lenses for name in names))
    table.add_row("model", *(decimals(getattr(evaluation.model, name)) if name in MODEL_COLUMNS else "" for name in names))
    captions = ["±: standard error, by the spread over sequences."] if any(errors.values()) else []
    if evaluation.untranslated:
        captions.append("-: the lens does not translate this layer.")
    if 0 < len(translated) < len(evaluation.logit):
        captions.append(f"The means are over the {len(translated)} layers that it translates.")
    if evaluation.token_shift != 1:
        captions.append(shift_remark(evaluation.token_shift))
    table.caption = " ".join(captions) or None
    return table


def closed_form_table(evaluation: Evaluation, closed_form: Evaluation) -> Table:
    """Make a table of the KL to the model [nats per token] of each layer: logit lens, closed form, trained lens, and their agreement.

    Args:
        evaluation: the evaluation of a trained lens.
        closed_form: the evaluation of the closed form that it began with, on the same text.

    Raises:
        InvalidValueError: if one of them is of the logit lens alone.
    """
    if evaluation.tuned is None or closed_form.tuned is None:
        which = "trained lens" if evaluation.tuned is None else "closed form"
        raise InvalidValueError(f"The evaluation of the {which} has scores of the logit lens alone: evaluate with a lens (lens=).")
    table = Table(title=f"{evaluation.tokens} tokens; KL(model || lens) in nats per token, top-1 agreement with the model")
    for column in ("layer", "logit lens KL", "closed form KL", "tuned lens KL", "logit lens top-1", "closed form top-1", "tuned lens top-1"):
        table.add_column(column, justify="right")
    lenses = (evaluation.logit, closed_form.tuned, evaluation.tuned)
    rows = [[*(layer.kl for layer in of_layer), *(layer.top1 for layer in of_layer)] for of_layer in zip(*lenses, strict=True)]
    formats = [decimals] * 3 + [percent] * 3
    for layer, row in enumerate(rows):
        table.add_row(str(layer), *_cells(formats, row))
    table.add_section()
    table.add_row("mean", *_cells(formats, [sum(column) / len(rows) for column in zip(*rows, strict=True)]))
    return table


def _nats(names: Sequence[str]) -> str:
    """Return the names of the columns that are in nats per token, as a list in words."""
    shown = ["KL(model || lens)", "cross-entropy", *(name for name in names if name in ("entropy", "bias"))]
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _cells(formats: Sequence[Callable[[float], str]], values: Iterable[float]) -> list[str]:
    return [shown(value) for shown, value in zip(formats, values, strict=True)]


def transfer_table(transfer: Transfer, num_layers: int | None = None) -> Table:
    """Make a table of the transfer penalty: a row for each translator, a column for each layer's hidden states.

    Args:
        transfer: the matrices.
        num_layers: blocks of the model, to say so if the lens does not translate all of them. None = not known.
    """
    table = Table(title="transfer penalty: what a translator (row) costs on another layer's hidden states (column), nats per token")
    table.add_column("", justify="right")
    for layer in transfer.layers:
        table.add_column(str(layer), justify="right")
    for layer, row in zip(transfer.layers, transfer.penalty, strict=True):
        table.add_row(str(layer), *(f"{value:z.2f}" for value in row))
    table.caption = translated_remark(transfer, num_layers)
    return table
