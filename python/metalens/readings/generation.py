"""Generate text, and read every layer while it appears; or generate from a layer in the middle.

Both go on from the model's own cache, so a token costs one token's pass through the blocks.

`generate_with_lenses` sends the rows of all R layers for this one token through the unembedding together (the kernels for few rows), with
the model's own row, once as a row and once to compare with; and one row to choose the token: n R + 3 rows a token for n lenses.

`generate_from_layer` stops every pass after the chosen block. What is right then: the token after a text is drawn from the lens's prediction
at this block, for the whole text as it stands. Each block sees the text through its own keys and values alone. So a pass that adds one token
to the cache of the blocks up to this one, and never fills those of the later blocks, gives the same prediction as reading the whole text anew.
(tuned-lens's `generate` gives the model the whole text again beside a cache that has it already. Its tokens differ from the second one on.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import mlx.core as mx
import numpy as np

from metalens.lenses.lens import Lens, as_lens
from metalens.lenses.provenance import check_lens
from metalens.models.language_model import LanguageModel
from metalens.models.layers import layers_in_order
from metalens.models.token_text import REPLACEMENT
from metalens.models.tokenization import TokenInput
from metalens.ops import head_logits
from metalens.ops.stats import check_top_k
from metalens.readings.cells_reader import Request, part_cells, split_rows
from metalens.readings.chosen_tokens import token_ids_of
from metalens.readings.comparison import Comparison, compare_lenses, divergences_from_first, join_divergences
from metalens.readings.rows import is_whole, lens_rows, select_layers
from metalens.readings.source import RowSource, next_rows, part_size
from metalens.readings.statistics import join_cells
from metalens.readings.texts import are_several
from metalens.readings.trajectory import Trajectory
from metalens.readings.trajectory_reader import assemble, checked_lenses
from metalens.utils.arrays import to_float
from metalens.utils.errors import InvalidTypeError, InvalidValueError


class GeneratedToken(NamedTuple):
    """A token that was generated.

    Attributes:
        token_id: its id.
        text: the text that it adds. "" while a character is not complete; the token that completes it adds all of it. Bytes that are no
            character after four tokens, or at the end of the text, are U+FFFD.
    """

    token_id: int
    text: str


@dataclass(frozen=True, eq=False)
class GenerationStep:
    """A token that was generated, and what every layer predicted there.

    Attributes:
        token_id, text: as in `GeneratedToken`.
        trajectories: for each lens the positions that this step read. The last column is the prediction that the token was drawn from, and
            its last target is the token. The first step has the whole prompt, the others have one position.
        comparisons: of each lens but the first with the first one, if they were asked for.
    """

    token_id: int
    text: str
    trajectories: list[Trajectory]
    comparisons: list[Comparison]

    @property
    def trajectory(self) -> Trajectory:
        """Return the trajectory of the first lens."""
        return self.trajectories[0]


class GenerationOptions(TypedDict, total=False):
    """The options of `generate_with_lenses`."""

    max_tokens: int
    temperature: float
    seed: int
    top_k: int
    layers: Sequence[int] | None
    embedding: bool
    tokens: Sequence[str | int]
    compare: bool


def generate_with_lens(
    model: LanguageModel,
    prompt: TokenInput,
    lens: Lens | str | Path | None = None,
    **options: Unpack[GenerationOptions],
) -> Iterator[GenerationStep]:
    """Generate text with the model, and yield each token with the readings of all layers. The arguments are checked at once.

    Args:
        model, prompt, options: as in `generate_with_lenses`.
        lens: as in `read_trajectory`.

    Raises:
        InvalidValueError, InvalidTypeError: as `generate_with_lenses`.
    """
    return generate_with_lenses(model, prompt, [lens], **options)


def generate_with_lenses(
    model: LanguageModel,
    prompt: TokenInput,
    lenses: Sequence[Lens | str | Path | None],
    *,
    max_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    top_k: int = 10,
    layers: Sequence[int] | None = None,
    embedding: bool = False,
    tokens: Sequence[str | int] = (),
    compare: bool = True,
    compare_lenses: bool = False,
) -> Iterator[GenerationStep]:
    """Generate text with the model, and yield each token with the readings of all layers through several lenses.

    The model runs once for each token, however many lenses read it. The arguments are checked at once.

    Args:
        model: a model with a cache, as all of mlx-lm have.
        prompt: a string, a list of token ids, or an array of ids [T].
        lenses: as in `read_lenses`.
        top_k, layers, embedding, tokens, compare: as in `read_trajectory`.
        compare_lenses: also compare each lens but the first with the first one.
        max_tokens: tokens to generate at most. The text ends before, at an end token of the tokenizer, which is yielded, or where
            the model has no more positions.
        temperature: 0 = the most likely token; else tokens are drawn from softmax(logits / temperature).
        seed: seed of the draws.

    Raises:
        InvalidValueError: as `read_trajectory`, and for max_tokens or a temperature out of range, or a model without a cache.
        InvalidTypeError: as `read_trajectory`.
    """
    read_by = checked_lenses(model, lenses)
    check_top_k(top_k, model.unembed.head.tokens)
    blocks = select_layers(layers, model.num_layers)
    rows = tuple(layers_in_order(blocks, embedding))
    if not rows:
        raise InvalidValueError("No layers were asked for. Pass layers=None for all of them.")
    chosen = token_ids_of(model, tokens)
    ids = _prompt(model, prompt)
    choose = _Choice(max_tokens, temperature, seed)
    sources = [RowSource(model, ids, lens, model.unembed.norm, rows, range(ids.shape[1])) for lens in read_by]
    return _steps(sources, Request(top_k, None, None, chosen, compare), choose, compare_lenses)


def _steps(sources: list[RowSource], request: Request, choose: _Choice, compared: bool) -> Iterator[GenerationStep]:
    model, head = sources[0].model, sources[0].head
    cache, text, ends = model.source.new_cache(), _Text(model), end_tokens(model)
    size, read = part_size(sources), 0
    for left in reversed(range(choose.count(model, sources[0].ids.shape[1]))):
        whole, parts = sources[0].ids, []
        for start in range(read, whole.shape[1], size):
            ids = whole[:, start : start + size]
            rows, own = next_rows(sources, ids, cache)
            token = choose(head_logits(own[-1:], head)[0, : head.tokens]) if start + size >= whole.shape[1] else -1
            following = np.append(np.array(whole[0, start + 1 : start + size + 1]), token)[: ids.shape[1]].astype(np.int32)
            cells = part_cells(sources, _with_targets(request, following), rows, own)
            parts.append((cells, following, divergences_from_first(rows, head) if compared else []))
            mx.eval([entry.state for entry in cache])
        targets = np.concatenate([part for _, part, _ in parts])
        of_lenses = split_rows(sources, join_cells([part for part, _, _ in parts]))
        positions = range(read, whole.shape[1])
        trajectories = [
            assemble(source.select(source.layers, positions), _with_targets(request, targets), *cells)
            for source, cells in zip(sources, of_lenses, strict=True)
        ]
        apart = [join_divergences(of_pair) for of_pair in zip(*(part for _, _, part in parts), strict=True)]
        comparisons = compare_lenses(trajectories, apart) if compared else []
        yield GenerationStep(token, text.add(token, last=not left or token in ends), trajectories, comparisons)
        if token in ends:
            return
        read = whole.shape[1]
        sources = [source.extended(token) for source in sources]


def _with_targets(request: Request, targets: np.ndarray) -> Request:
    return Request(request.top_k, targets, None, request.chosen, request.compare)


def generate_from_layer(
    model: LanguageModel,
    prompt: TokenInput,
    layer: int,
    lens: Lens | str | Path | None = None,
    *,
    max_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[GeneratedToken]:
    """Generate text from the output of one block, as the lens reads it: the blocks after it never run (early exit).

    The arguments are checked at once.

    Args:
        model: a model with a cache, as all of mlx-lm have.
        prompt: a string, a list of token ids, or an array of ids [T].
        layer: number of the block, negative from the end.
        lens: as in `read_trajectory`. None = the logit lens.
        max_tokens, temperature, seed: as in `generate_with_lens`.

    Raises:
        InvalidValueError, InvalidTypeError: as `generate_with_lens`.
    """
    lens = as_lens(lens)
    check_lens(lens, model)
    (block,) = select_layers([layer], model.num_layers)
    return _early_tokens(model, _prompt(model, prompt), block, lens, _Choice(max_tokens, temperature, seed))


def _early_tokens(model: LanguageModel, ids: mx.array, block: int, lens: Lens, choose: _Choice) -> Iterator[GeneratedToken]:
    head, norm = model.unembed.head, model.unembed.norm
    cache, text, ends = model.source.new_cache(), _Text(model), end_tokens(model)
    for left in reversed(range(choose.count(model, ids.shape[1]))):
        states = model.source.capture_next(ids, cache, last_block=block)
        last = [h[0, -1:] for h in states.hidden]
        token = choose(head_logits(lens_rows(last, [block], lens, norm)[0], head)[0, : head.tokens])
        mx.eval([entry.state for entry in cache if not entry.empty()])
        yield GeneratedToken(token, text.add(token, last=not left or token in ends))
        if token in ends:
            return
        ids = mx.array([[token]], dtype=mx.int32)


def end_tokens(model: LanguageModel) -> frozenset[int]:
    """Return the ids that end a text, as the tokenizer tells them; none if it does not."""
    found: Any = getattr(model.tokenizer, "eos_token_ids", None)
    found = getattr(model.tokenizer, "eos_token_id", None) if found is None else found
    return frozenset(() if found is None else [found] if isinstance(found, int) else found)


def _prompt(model: LanguageModel, prompt: TokenInput) -> mx.array:
    if not model.source.takes_cache:
        raise InvalidValueError("Text is generated with the model's cache, and this model takes none: its __call__ has no argument 'cache'.")
    if are_several(prompt):
        raise InvalidTypeError("Text is generated from one prompt, not from a list of them.")
    ids = model.ids(prompt)[:1]
    model.source.require_length(ids.shape[1])
    return ids


class _Choice:
    """Chooses the next token from logits [V]. It has a random key of its own and leaves the global one alone."""

    def __init__(self, max_tokens: int, temperature: float, seed: int) -> None:
        if not is_whole(max_tokens) or not is_whole(seed):
            raise InvalidTypeError(f"max_tokens and seed must be whole numbers, got {max_tokens!r:.50} and {seed!r:.50}.")
        if max_tokens < 1:
            raise InvalidValueError(f"max_tokens must be at least 1, got {max_tokens}.")
        if not 0 <= temperature < float("inf"):
            raise InvalidValueError(f"temperature must be a number from 0 on, got {temperature}.")
        self._max_tokens, self._temperature = max_tokens, temperature
        self._key = mx.random.key(int(seed) % 2**64)

    def count(self, model: LanguageModel, prompt_tokens: int) -> int:
        """Return how many tokens to generate at most: no more than the model has positions for."""
        limit = model.source.position_limit
        return self._max_tokens if limit is None else min(self._max_tokens, limit - prompt_tokens + 1)

    def __call__(self, z: mx.array) -> int:
        if not to_float(mx.isfinite(mx.max(z))):
            raise InvalidValueError("The logits are NaN or infinite for this text: the model or the lens holds damaged weights.")
        if self._temperature == 0:
            return int(to_float(mx.argmax(z)))
        self._key, key = mx.random.split(self._key)
        return int(to_float(mx.random.categorical(z / self._temperature, key=key)))


class _Text:
    """The text that each token adds."""

    WINDOW = 32  # tokens that are decoded again with a new one
    WITHHELD = 4  # tokens in which a character must be complete: UTF-8 has at most four bytes

    def __init__(self, model: LanguageModel) -> None:
        self._model, self._ids, self._shown = model, [], ""  # type: tuple[LanguageModel, list[int], str]
        self._withheld = 0

    def add(self, token: int, *, last: bool = False) -> str:
        """Return the text that a token adds. `last` = no other one follows."""
        if self._model.tokenizer is None:
            return f"<{token}>"
        self._ids.append(token)
        text = self._model.decode(self._ids)
        self._withheld = self._withheld + 1 if text.endswith(REPLACEMENT) else 0
        if 0 < self._withheld < self.WITHHELD and not last:
            return ""
        self._withheld = 0
        new, self._shown = text[len(self._shown) :], text
        if len(self._ids) > self.WINDOW:
            self._ids = self._ids[-4:]
            self._shown = self._model.decode(self._ids)
        return new
