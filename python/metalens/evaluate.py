"""How good a lens is on text: per layer KL to the model, cross-entropy, bits per byte, top-1 agreement, beside the logit lens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from metalens.arrays import nested
from metalens.lens import Lens, LogitLens
from metalens.model import InterpretableModel
from metalens.ops import LensStats, lens_stats
from metalens.progress import token_bar
from metalens.readout import lens_rows, require_finite
from metalens.tokens import TokenInput


@dataclass(frozen=True)
class Scores:
    """Means over tokens; nats per token unless said.

    Attributes:
        kl: KL(model || lens), over all positions.
        ce: cross-entropy of the next token, over all positions that have one.
        bits_per_byte: ce in bits, per byte of the text.
        top1: share of positions where the most likely token is the model's.
    """

    kl: float
    ce: float
    bits_per_byte: float
    top1: float


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        tokens: positions read.
        bytes_per_token: of the text, for converting nats to bits per byte.
        model: the model's own scores (kl 0, top1 1).
        logit: the logit lens's, one per layer; layer i is the output of block i.
        tuned: the tuned lens's, or None without one.
    """

    tokens: int
    bytes_per_token: float
    model: Scores
    logit: list[Scores]
    tuned: list[Scores] | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON: {"tokens", "bytes_per_token", "model": {...}, "layers": [{"layer", "logit": {...}, "tuned": {...}}, ...]}."""
        layers = [{"layer": i, "logit": asdict(scores)} for i, scores in enumerate(self.logit)]
        for entry, scores in zip(layers, self.tuned or [], strict=False):
            entry["tuned"] = asdict(scores)
        return {"tokens": self.tokens, "bytes_per_token": self.bytes_per_token, "model": asdict(self.model), "layers": layers}


def evaluate(
    model: InterpretableModel,
    text: TokenInput,
    lens: Lens | None = None,
    *,
    max_seq_len: int | None = None,
    max_tokens: int | None = None,
    show_progress: bool = False,
) -> Evaluation:
    """Read a text through the logit lens and, if given, a tuned lens.

    The text is cut into sequences of max_seq_len tokens (the last may be shorter); the first token of a sequence has no prediction.

    Args:
        model: the model.
        text: a string, ids, or an array of ids [T].
        lens: a TunedLens of this model, or any function (hidden, layer) -> hidden.
        max_seq_len: tokens per sequence, at least 2; None = 512, or the model's context if that is shorter.
        max_tokens: read only this many tokens from the start.
        show_progress: a progress bar on stderr.

    Raises:
        ValueError: for an empty text or one token, a lens of another model, or settings out of range.
    """
    max_seq_len = model.default_sequence_length if max_seq_len is None else max_seq_len
    if max_seq_len < 2 or (max_tokens is not None and max_tokens < 2):
        raise ValueError(f"max_seq_len and max_tokens must be at least 2, got {max_seq_len} and {max_tokens}: a prediction needs a next token.")
    ids = model.ids(text)[0][:max_tokens]
    if ids.size < 2:
        raise ValueError("The text has a single token; an evaluation needs at least two.")
    if lens is not None:
        model.check_lens(lens)
    lenses = {"logit": LogitLens()} | ({} if lens is None else {"tuned": lens})
    unembed, num_layers = model.checked_unembed, len(model.source)
    sums = {name: _Sums(num_layers) for name in lenses}
    own = _Sums(1)
    with token_bar(int(ids.size), "evaluating", show_progress) as bar:
        for sequence in _sequences(ids, max_seq_len):
            hidden = [h[0] for h in model.source.capture(sequence[None]).hidden]
            n_model = unembed.norm(hidden[-1])
            labels = mx.concatenate([sequence[1:], sequence[:1]])  # the last one is a stand-in, left out below
            for name, each in lenses.items():
                rows = lens_rows(hidden, range(num_layers), each, unembed.norm)
                sums[name].add(lens_stats(rows, unembed.head, 1, n_model, labels))
            own.add(lens_stats(n_model[None], unembed.head, 1, n_model, labels))
            bar.update(sequence.size)
    tokens = int(ids.size)
    bytes_per_token = _bytes(model, ids) / tokens
    scores = {name: total.scores(bytes_per_token) for name, total in sums.items()}
    return Evaluation(tokens, bytes_per_token, own.scores(bytes_per_token)[0], scores["logit"], scores.get("tuned"))


def _sequences(ids: mx.array, length: int) -> Iterator[mx.array]:
    """Cut; a tail of one token, which could predict nothing, joins the sequence before it."""
    start = 0
    while start < ids.size:
        end = start + length if ids.size - start - length > 1 else ids.size
        yield ids[start:end]
        start = end


def _bytes(model: InterpretableModel, ids: mx.array) -> float:
    """UTF-8 bytes of the decoded text; without a tokenizer a token counts as one byte."""
    return len(model.decode(ids).encode()) if model.tokenizer is not None else float(ids.size)


class _Sums:
    """Sums over tokens, per layer, in Python's double precision."""

    def __init__(self, layers: int) -> None:
        self.kl, self.nll, self.agreements = ([0.0] * layers for _ in range(3))
        self.positions = 0
        self.labels = 0

    def add(self, stats: LensStats) -> None:
        require_finite(stats)
        assert stats.kl is not None
        assert stats.nll is not None
        assert stats.agrees is not None
        n = stats.kl.shape[1]
        for total, values in ((self.kl, stats.kl), (self.nll, stats.nll[:, :-1]), (self.agreements, stats.agrees.astype(mx.float32))):
            for i, value in enumerate(nested(mx.sum(values, axis=1))):
                total[i] += value
        self.positions += n
        self.labels += n - 1

    def scores(self, bytes_per_token: float) -> list[Scores]:
        result = []
        for kl, nll, agreements in zip(self.kl, self.nll, self.agreements, strict=True):
            ce = nll / self.labels
            result.append(Scores(kl / self.positions, ce, ce / math.log(2) / bytes_per_token, agreements / self.positions))
        return result
