"""How good a lens is on text: per layer KL to the model, cross-entropy, entropy, bits per byte, top-1 agreement, beside the logit lens.

On request also layer transfer and marginals with their bias. The conventions are those of upstream's `tuned-lens eval`, except that layer i is the
output of block i and that means are over tokens, of sequences that may differ in length (upstream drops tails; without tails the two are equal).
"""

from __future__ import annotations

import math

import mlx.core as mx

from metalens.evaluation import Evaluation, EvaluationText, LogitStats, Scores, Transfer, write_results
from metalens.evaluation.marginals import LogitSums
from metalens.evaluation.scores import Sums
from metalens.evaluation.text import Sequences
from metalens.evaluation.transfer import TransferSums
from metalens.lenses.lens import Lens, LogitLens
from metalens.model import InterpretableModel
from metalens.ops import lens_stats
from metalens.readings.reading import lens_rows
from metalens.utils.errors import InvalidValueError
from metalens.utils.progress_bar import token_bar

__all__ = ["Evaluation", "EvaluationText", "LogitStats", "Scores", "Transfer", "evaluate", "write_results"]


def evaluate(
    model: InterpretableModel,
    text: EvaluationText,
    lens: Lens | None = None,
    *,
    max_seq_len: int | None = None,
    max_tokens: int | None = None,
    layer_transfer: bool = False,
    logit_stats: bool = False,
    bytes_per_token: float | None = None,
    show_progress: bool = False,
) -> Evaluation:
    """Read a text through the logit lens and, if given, a tuned lens.

    Each document is cut into sequences of max_seq_len tokens (its last may be shorter, or one longer); the first token of a sequence has no
    prediction. One sequence is in memory at a time. KL and entropy are over all positions, cross-entropy over those with a next token.

    Cost: 2 L + 1 rows through the head for each token; layer_transfer adds 2 L^2, logit_stats 2 L + 1 without a fused operation.

    Args:
        model: the model.
        text: a string, ids, or an array of ids [T], memory-mapped or not; a corpus (`metalens.training.data.open_corpus`), whose prefix goes before
            every sequence and counts as read; or documents: any iterable of strings or arrays of ids [T]. One that does not end needs max_tokens.
        lens: a TunedLens of this model, or any function (hidden, layer) -> hidden.
        max_seq_len: tokens per sequence, at least 2; None = 512, or the model's context if that is shorter.
        max_tokens: read only this many tokens from the start, prefixes not counted.
        layer_transfer: also apply the translator of every layer to the hidden states of every other. Needs a lens.
        logit_stats: also average the predictions over the text; 16 bytes for each layer and token of the vocabulary, for each lens.
        bytes_per_token: of the text, for each position read; None = those of the corpus if it knows them (upstream's ratio), else decode what is read
            and count its bytes in UTF-8, special tokens as the tokenizer spells them. Without a tokenizer a token counts as one byte.
        show_progress: a progress bar on stderr.

    Raises:
        ValueError: for an empty text or one without a next token, a lens of another model, or settings out of range.
        TypeError: for what is no text, or no lens.
    """
    max_seq_len = model.default_sequence_length if max_seq_len is None else max_seq_len
    _check_settings(max_seq_len, max_tokens, bytes_per_token)
    if lens is not None:
        model.check_lens(lens)
    elif layer_transfer:
        raise InvalidValueError("layer_transfer needs a tuned lens: the logit lens has the same translator, none, for every layer.")
    lenses = {"logit": LogitLens()} | ({} if lens is None else {"tuned": lens})
    unembed, num_layers = model.unembed, len(model.source)
    own, sums = Sums(1), {name: Sums(num_layers) for name in lenses}
    transfer = TransferSums(num_layers) if layer_transfer else None
    depths = {"model": 1} | dict.fromkeys(lenses, num_layers)
    marginals = {name: LogitSums(depth, unembed.head) for name, depth in depths.items()} if logit_stats else {}
    sequences = Sequences(model, text, max_seq_len, max_tokens)
    with token_bar(sequences.size, "evaluating", show_progress) as bar:
        for sequence in sequences:
            hidden = [h[0] for h in model.source.capture(sequence[None]).hidden]
            n_model = unembed.norm(hidden[-1])
            labels = mx.concatenate([sequence[1:], sequence[:1]])  # the last one is a stand-in, left out by the sums
            own.add(lens_stats(n_model[None], unembed.head, 1, n_model, labels))
            for name, each in lenses.items():
                rows = lens_rows(hidden, range(num_layers), each, unembed.norm)
                sums[name].add(lens_stats(rows, unembed.head, 1, n_model, labels))
                if marginals:
                    marginals[name].add(rows)
            if marginals:
                marginals["model"].add(n_model[None])
            if transfer is not None and lens is not None:
                transfer.add(hidden, lens, unembed, n_model, labels)
            bar.update(sequence.size - len(sequences.prefix))
    if own.labels == 0:
        found = "documents of a single token only" if own.positions else "no tokens"
        raise InvalidValueError(f"The text has {found}; an evaluation needs a token with a next one.")
    if bytes_per_token is None:
        bytes_per_token = sequences.bytes_per_token * sequences.tokens / own.positions
    nats_to_bpb = 1 / (bytes_per_token * math.log(2))
    scores = {name: each.scores(nats_to_bpb) for name, each in sums.items()}
    return Evaluation(
        own.positions,
        bytes_per_token,
        own.scores(nats_to_bpb)[0],
        scores["logit"],
        scores.get("tuned"),
        transfer.means() if transfer is not None else None,
        {name: each.means() for name, each in marginals.items()} if logit_stats else None,
    )


def _check_settings(max_seq_len: int, max_tokens: int | None, bytes_per_token: float | None) -> None:
    if max_seq_len < 2 or (max_tokens is not None and max_tokens < 2):
        raise InvalidValueError(
            f"max_seq_len and max_tokens must be at least 2, got {max_seq_len} and {max_tokens}: a prediction needs a next token."
        )
    if bytes_per_token is not None and not (bytes_per_token > 0 and math.isfinite(bytes_per_token)):
        raise InvalidValueError(f"bytes_per_token must be a positive number, got {bytes_per_token}.")
