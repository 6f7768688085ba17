"""Stimulus-response alignment: whether a lens foresees how the model answers to a change of its hidden states.

At one block and the last position of a sequence, what the block adds is replaced by what it adds in another sequence (resampling). The
stimulus is the change of the lens's prediction at this block, the response that of the model's own prediction. Their alignment is the
cosine of both changes in weighted Aitchison geometry (Belrose et al. 2023, section 4.2 and figure 9).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metalens.analysis.ablation import derangement
from metalens.analysis.aitchison import change_similarity
from metalens.analysis.resampling import Interval, bootstrap_mean
from metalens.analysis.sequences import equal_sequences
from metalens.evaluation.text import EvaluationText
from metalens.lenses.lens import Lens, LogitLens, as_lens
from metalens.lenses.provenance import check_lens
from metalens.models.capture import BlockEdit, HiddenStates
from metalens.models.language_model import LanguageModel
from metalens.ops import lens_compare
from metalens.readings.rows import lens_rows, select_layers
from metalens.utils.errors import InvalidValueError
from metalens.utils.progress_bar import token_bar

BATCH = 32  # sequences whose blocks' contributions are exchanged among each other


@dataclass(frozen=True)
class LensAlignment:
    """How one lens foresees the model's responses at one layer. Intervals are bootstraps over sequences.

    Attributes:
        similarity: mean Aitchison similarity of stimulus and response, -1 to 1.
        stimulus: mean KL(lens before || lens after), in nats.
        samples: number of sequences with a similarity: those whose stimulus and response are not 0.
    """

    similarity: Interval
    stimulus: Interval
    samples: int


@dataclass(frozen=True)
class Alignment:
    """The stimulus-response alignment at one layer.

    Attributes:
        layer: the block whose contribution is resampled.
        response: mean KL(model before || model after), in nats, with its interval.
        lenses: {name of the lens: its alignment}.
    """

    layer: int
    response: Interval
    lenses: dict[str, LensAlignment]


def stimulus_response_alignment(
    model: LanguageModel,
    text: EvaluationText,
    lens: Lens | str | Path | None = None,
    *,
    layers: Sequence[int] | None = None,
    seq_len: int = 64,
    max_sequences: int = 64,
    bos: bool = True,
    mean_weights: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    show_progress: bool = False,
) -> list[Alignment]:
    """Measure the stimulus-response alignment of the logit lens and, if given, of a tuned lens.

    Each sequence is one sample: its last token. Cost: one token for each layer and sequence after one pass of the text, or one pass for
    each layer if the model has no cache.

    Args:
        model: the model.
        text: as in `metalens.evaluate`.
        lens: a TunedLens of this model, the path of one, or any function (hidden [..., D], layer) -> [..., D]. None = the logit lens
            alone.
        layers: layer numbers, negative from the end; None = all.
        seq_len: tokens per sequence, at least 2. Shorter pieces of the text are left out.
        max_sequences: sequences to read, at least 2.
        bos: begin each sequence with the tokens that the tokenizer puts before a text.
        mean_weights: weight tokens by the mean of the model's predictions before and after, as tuned-lens's v0.0.3 does. False = by the
            one before, as the paper does.
        resamples: resamples of the bootstrap.
        seed: seed of the exchange and of the bootstrap.
        show_progress: show a progress bar on stderr.

    Returns:
        one entry for each layer, with the lenses "logit" and "tuned".

    Raises:
        FileNotFoundError: if there is no lens at the path.
        InvalidValueError: if the text has fewer than two such sequences, for a lens of another model, an unknown layer, or settings out
            of range.
    """
    if seq_len < 2 or max_sequences < 2:
        raise InvalidValueError(f"seq_len and max_sequences must be at least 2, got {seq_len} and {max_sequences}.")
    lenses: dict[str, Lens] = {"logit": LogitLens()} | ({} if lens is None else {"tuned": as_lens(lens)})
    for each in lenses.values():
        check_lens(each, model)
    chosen = select_layers(layers, model.num_layers)
    ids = equal_sequences(model, text, seq_len, max_sequences, at_least=2, bos=bos)
    samples = _Samples(chosen, lenses, model, mean_weights)
    with token_bar(ids.size, "exchanging", show_progress) as bar:
        for part, batch in enumerate(np.array_split(np.arange(len(ids)), max(1, len(ids) // BATCH))):
            samples.add(ids[mx.array(batch)], seed + part)
            bar.update(len(batch) * seq_len)
    return samples.results(resamples, seed)


class _Samples:
    """The samples of all layers and lenses so far."""

    def __init__(self, layers: Sequence[int], lenses: Mapping[str, Lens], model: LanguageModel, mean_weights: bool) -> None:
        self.layers, self.lenses, self.model, self.mean_weights = layers, lenses, model, mean_weights
        self.found: dict[Any, list[np.ndarray]] = {}

    def add(self, ids: mx.array, seed: int) -> None:
        """Exchange the contributions of each block at the last position among sequences [B, T]."""
        run = _LastToken(self.model, ids)
        order = mx.array(derangement(len(ids), seed))
        intact = run.states({})
        unembed = self.model.unembed
        own = unembed.norm(intact.hidden[-1][:, -1]).astype(mx.float32)

        def exchanged(given: mx.array, output: mx.array) -> mx.array:
            last = given[:, -1:] + (output - given)[order, -1:]
            return mx.concatenate([output[:, :-1], last], axis=1)

        for layer in self.layers:
            treated = run.states({layer: BlockEdit(exchanged)})
            changed = unembed.norm(treated.hidden[-1][:, -1]).astype(mx.float32)
            self._keep((layer, "response"), lens_compare(own[None], changed[None], unembed.head).kl[0])
            for name, lens in self.lenses.items():
                before, after = (self._read(states, layer, lens) for states in (intact, treated))
                self._keep((layer, name, "stimulus"), lens_compare(before[None], after[None], unembed.head).kl[0])
                similarity = change_similarity((before, after), (own, changed), unembed.head, mean_weights=self.mean_weights)
                self._keep((layer, name, "similarity"), similarity)

    def _read(self, states: HiddenStates, layer: int, lens: Lens) -> mx.array:
        hidden = [h[:, -1] for h in states.hidden]
        return lens_rows(hidden, [layer], lens, self.model.unembed.norm)[0].astype(mx.float32)

    def _keep(self, key: Any, values: mx.array) -> None:
        self.found.setdefault(key, []).append(np.array(values).astype(np.float64))

    def results(self, resamples: int, seed: int) -> list[Alignment]:
        """Return the means with their intervals."""

        def mean(*key: Any) -> tuple[Interval, int]:
            values = np.concatenate(self.found[key])
            values = values[~np.isnan(values)]
            nothing = Interval(float("nan"), float("nan"), float("nan"))
            return (bootstrap_mean(values, resamples=resamples, seed=seed) if values.size else nothing), values.size

        alignments = []
        for layer in self.layers:
            lenses = {}
            for name in self.lenses:
                similarity, samples = mean(layer, name, "similarity")
                lenses[name] = LensAlignment(similarity, mean(layer, name, "stimulus")[0], samples)
            alignments.append(Alignment(layer, mean(layer, "response")[0], lenses))
        return alignments


class _LastToken:
    """Runs the last token of sequences again and again, each time with another edit. The tokens before it run once, if there is a cache."""

    def __init__(self, model: LanguageModel, ids: mx.array) -> None:
        self.source, self.ids, self.cache = model.source, ids, None
        if self.source.takes_cache and ids.shape[1] > 1:
            self.source.require_length(ids.shape[1])
            cache = self.source.new_cache()
            self.source.capture_next(ids[:, :-1], cache)
            mx.eval([part.state for part in cache])
            self.cache = cache

    def states(self, edits: Mapping[int, BlockEdit]) -> HiddenStates:
        """Return the hidden states with an edit, evaluated; their last position is the last token."""
        if self.cache is None:
            states = self.source.capture(self.ids, edits)
        else:
            states = self.source.capture_next(self.ids[:, -1:], copy.deepcopy(self.cache), edits=edits)
        mx.eval(states.hidden)
        return states
