"""Evaluate a lens on text: per layer KL to the model, cross-entropy, entropy, bits per byte and top-1 agreement, beside the logit lens.

On request also layer transfer, and marginals with their bias. The conventions are those of upstream's `tuned-lens
eval`, with two differences: layer i is the output of block i, and means are over tokens of sequences that may differ in
length. (Upstream drops the tail of a text. Without tails the means are equal.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from metalens.evaluation.marginals import LogitSums
from metalens.evaluation.results import Evaluation
from metalens.evaluation.scores import Sums
from metalens.evaluation.sequences import SequenceScores
from metalens.evaluation.targets import Targets
from metalens.evaluation.text import EvaluationText, Sequences
from metalens.evaluation.transfer import TransferSums
from metalens.lenses.lens import Lens, LogitLens, as_lens, token_shift_of, untranslated_layers
from metalens.lenses.provenance import check_lens
from metalens.models.language_model import LanguageModel
from metalens.models.layers import EMBEDDING, layers_in_order
from metalens.models.sharding import Sharding
from metalens.models.unembed import Unembed
from metalens.ops import lens_stats
from metalens.readings.rows import lens_rows
from metalens.utils.errors import InvalidValueError
from metalens.utils.progress_bar import token_bar


def evaluate(
    model: LanguageModel,
    text: EvaluationText,
    lens: Lens | str | Path | None = None,
    *,
    max_seq_len: int | None = None,
    max_tokens: int | None = None,
    bos: bool = True,
    layer_transfer: bool = False,
    logit_stats: bool = False,
    embedding: bool = False,
    token_shift: int | None = None,
    bytes_per_token: float | None = None,
    show_progress: bool = False,
) -> Evaluation:
    """Measure the logit lens and, if given, a tuned lens on a text.

    Each document is cut into sequences of max_seq_len tokens; the last one may be shorter, or one token longer. Each
    sequence begins with the tokens that the tokenizer puts before a text, often a beginning-of-sequence token: models
    with one predict badly without it. A document that begins with them itself does not get them twice. The first token
    of a sequence has no prediction. One sequence is in memory at a time. KL and entropy are means over all positions,
    cross-entropy over the positions with a next token.

    The processes of a divided model divide the layers of the lens, and each returns the whole result.

    Cost: each token takes 2 L + 1 rows through the head. layer_transfer adds 2 L^2 rows; logit_stats adds 2 L + 1 rows
    without a fused operation.

    Args:
        model: the model.
        text: a string, token ids, or an array of ids [T], which may be memory-mapped; a corpus
            (`metalens.training.data.open_corpus`), whose prefix goes before every sequence and counts as read, and which may have
            some tokens count (loss_on='answers'): means are over these, and so are bits per byte; or
            documents: any iterable of strings or arrays of ids [T]. An endless iterable needs max_tokens.
        lens: a TunedLens of this model, the path of one, or any function (hidden [..., D], layer) -> [..., D]. None =
            the logit lens alone.
        max_seq_len: tokens per sequence, at least 2; None = 512, or the model's context if that is shorter.
        max_tokens: tokens to read from the start, without prefixes; None = all.
        bos: begin each sequence with the tokens that the tokenizer puts before a text.
        layer_transfer: also apply the translator of every layer to the hidden states of every other layer that the lens translates. Needs a
            lens.
        logit_stats: also average the predictions over the text. Takes 16 bytes for each layer, token of the vocabulary
            and lens.
        embedding: also measure the embedding's output, through the translator that the lens has for it. Where it has none, the logit lens's
            scores are the only ones.
        token_shift: positions from a prediction of a lens to the token that it is scored against, as upstream's eval counts: 1 = the next
            token. The KL is to the model's own prediction of that token. None = what the lens was trained for, which it remembers: s + 1 after a
            training with token_shift = s and the loss kl, s with the loss ce, else 1. Positions without such a token in their sequence take no part.
        bytes_per_token: UTF-8 bytes of the text for each position read. None = the mean of the whole corpus or string, also
            with max_tokens (upstream's ratio); for other texts count the bytes of the decoded tokens, special tokens as the
            tokenizer spells them. Without a tokenizer a token counts as one byte.
        show_progress: show a progress bar on stderr.

    Raises:
        FileNotFoundError: if there is no lens at the path.
        InvalidValueError: for an empty text or one without a next token, a lens of another model, or settings out of
            range.
        InvalidTypeError: if the text is no text, or the lens no lens.
    """
    max_seq_len = model.default_sequence_length if max_seq_len is None else max_seq_len
    _check_settings(max_seq_len, max_tokens, bytes_per_token)
    tuned = None if lens is None else as_lens(lens)
    if tuned is not None:
        check_lens(tuned, model)
    elif layer_transfer:
        raise InvalidValueError("layer_transfer needs a tuned lens: the logit lens has the same translator, none, for every layer.")
    shift = token_shift_of(tuned) if token_shift is None else token_shift
    totals = _Totals(model, tuned, layer_transfer, logit_stats, embedding, shift)
    sequences = Sequences(model, text, max_seq_len, max_tokens, bos)
    with token_bar(sequences.size, "evaluating", show_progress) as bar:
        for ids, counted in sequences.masked():
            totals.add(ids, counted)
            bar.update(sequences.tokens - bar.n)
    totals.require_labels()
    totals.gather()
    if bytes_per_token is None:
        bytes_per_token = sequences.bytes_per_token * sequences.counted_tokens / totals.read
    return totals.evaluation(bytes_per_token)


def _check_settings(max_seq_len: int, max_tokens: int | None, bytes_per_token: float | None) -> None:
    if max_seq_len < 2 or (max_tokens is not None and max_tokens < 2):
        raise InvalidValueError(
            f"max_seq_len and max_tokens must be at least 2, got {max_seq_len} and {max_tokens}: a prediction needs a next token."
        )
    if bytes_per_token is not None and not (bytes_per_token > 0 and math.isfinite(bytes_per_token)):
        raise InvalidValueError(f"bytes_per_token must be a positive number, got {bytes_per_token}.")


class _Totals:
    """Everything that one evaluation adds up: the model's own scores, those of each lens, and layer transfer."""

    def __init__(self, model: LanguageModel, tuned: Lens | None, layer_transfer: bool, logit_stats: bool, embedding: bool, token_shift: int) -> None:
        self.source, self.unembed, self.sharding, self.token_shift = model.source, model.unembed, model.sharding, token_shift
        num_layers = len(model.source)
        self.layers = list(range(num_layers)) if self.sharding is None else self.sharding.layers_of(range(num_layers))
        self.model = _LensTotals(1, self.unembed, logit_stats)
        self.lenses: dict[str, Lens] = {"logit": LogitLens()} | ({} if tuned is None else {"tuned": tuned})
        self.totals = {name: _LensTotals(num_layers, self.unembed, logit_stats) for name in self.lenses}
        self.embedding = {name: _LensTotals(1, self.unembed, logit_stats) for name in self.lenses} if embedding else {}
        rows = layers_in_order(num_layers, embedding)
        self.untranslated = () if tuned is None else untranslated_layers(tuned, rows)
        self.transfer = TransferSums([layer for layer in rows if layer not in self.untranslated]) if layer_transfer else None
        self.read = 0  # positions that count, scored or not
        self.sizes: list[tuple[int, int]] = []  # positions and labels of each sequence

    @property
    def positions(self) -> int:
        """Return the number of positions scored."""
        return self.model.scores.positions

    def add(self, ids: mx.array, counted: np.ndarray | None) -> None:
        """Add a sequence of ids [T]. `counted` says at which the prediction counts, bool [T]; None = at every one."""
        self.read += len(ids) if counted is None else int(counted.sum())
        targets = Targets.of(ids, counted, self.token_shift)
        if not targets:
            return
        captured = self.source.capture(ids[None], with_embedding=bool(self.embedding))
        labels, unlabeled = targets.labels, targets.unlabeled
        self.sizes.append((len(labels), len(labels) - unlabeled))
        rows_of = functools.cache(lambda layer: targets.rows(captured, layer))
        n_model = self.unembed.norm(targets.model_rows(captured))
        self.model.add(n_model[None], n_model, labels, unlabeled)
        for name, lens in self.lenses.items():
            if self.layers:  # with more processes than layers, some have none
                rows = lens_rows([rows_of(layer) for layer in range(len(captured.hidden))], self.layers, lens, self.unembed.norm)
                self.totals[name].add(rows, n_model, labels, unlabeled, self.layers)
            else:
                self.totals[name].scores.add_nothing()
        for name, totals in self.embedding.items():
            rows = lens_rows({EMBEDDING: rows_of(EMBEDDING)}, [EMBEDDING], self.lenses[name], self.unembed.norm)
            totals.add(rows, n_model, labels, unlabeled)
        if self.transfer is not None:
            own = self.transfer.layers if self.sharding is None else self.sharding.layers_of(self.transfer.layers)
            self.transfer.add(rows_of, self.lenses["tuned"], self.unembed, n_model, labels, unlabeled, own)

    def require_labels(self) -> None:
        """Check that some position had a next token."""
        if self.model.scores.labels == 0:
            if self.read and self.token_shift != 1:
                raise InvalidValueError(
                    f"No sequence has a token {self.token_shift} positions from another: give longer sequences or a smaller token_shift."
                )
            found = "documents of a single token only" if self.read else "no tokens"
            raise InvalidValueError(f"The text has {found}; an evaluation needs a token with a next one.")

    def gather(self) -> None:
        """Take over what other processes have computed, if the model is divided."""
        if self.sharding is None:
            return
        for each in self.totals.values():
            each.gather(self.sharding, self.model)
        if self.transfer is not None:
            self.transfer.gather(self.sharding)

    def evaluation(self, bytes_per_token: float) -> Evaluation:
        """Return the means over the text."""
        nats_to_bpb = 1 / (bytes_per_token * math.log(2))
        scores = {name: each.scores.scores(nats_to_bpb) for name, each in self.totals.items()}
        embedding = {name: each.scores.scores(nats_to_bpb)[0] for name, each in self.embedding.items()}
        marginals = {name: each.marginals.means() for name, each in self._by_name().items() if each.marginals is not None}
        return Evaluation(
            tokens=self.positions,
            bytes_per_token=bytes_per_token,
            model=self.model.scores.scores(nats_to_bpb)[0],
            logit=scores["logit"],
            tuned=scores.get("tuned"),
            transfer=None if self.transfer is None else self.transfer.means(),
            logit_stats=marginals or None,
            untranslated=self.untranslated,
            embedding=embedding or None,
            sequences=self._sequences(),
            token_shift=self.token_shift,
        )

    def _by_name(self) -> dict[str, _LensTotals]:
        """Return the sums of the model and of the lenses, and those of the embedding under names of their own."""
        return {"model": self.model, **self.totals, **{f"{name} embedding": each for name, each in self.embedding.items()}}

    def _sequences(self) -> SequenceScores:
        """Return the values of every sequence."""
        positions, labels = np.array(self.sizes, np.int64).T
        sums = {name: np.stack(each.scores.by_sequence) for name, each in self._by_name().items()}
        return SequenceScores(positions, labels, sums, self.untranslated)


class _LensTotals:
    """The sums of one lens, or of the model as a lens of one layer."""

    def __init__(self, num_layers: int, unembed: Unembed, logit_stats: bool) -> None:
        self.head = unembed.head
        self.scores = Sums(num_layers)
        self.marginals = LogitSums(num_layers, unembed.head) if logit_stats else None

    def add(self, rows: mx.array, n_model: mx.array, labels: mx.array, unlabeled: int, layers: Sequence[int] | None = None) -> None:
        """Add rows of a sequence, the last `unlabeled` of them without a next token.

        Args:
            rows: rows [L, T, D] of some layers.
            n_model: the model's own rows [T, D].
            labels: next tokens [T].
            unlabeled: number of placeholders at the end of the labels.
            layers: the layers. None = all.
        """
        self.scores.add(lens_stats(rows, self.head, 1, n_model, labels), unlabeled, layers)
        if self.marginals is not None:
            self.marginals.add(rows, layers)

    def gather(self, sharding: Sharding, model: _LensTotals) -> None:
        """Take over the sums of other processes. The counts are those of the model, which every process reads."""
        self.scores.gather(sharding)
        self.scores.positions, self.scores.labels = model.scores.positions, model.scores.labels
        if self.marginals is not None:
            self.marginals.gather(sharding)
            self.marginals.n = model.scores.positions
