"""Read a text through a lens."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from metalens.lenses.lens import Lens, LogitLens
from metalens.lenses.provenance import check_lens
from metalens.models.language_model import LanguageModel
from metalens.models.tokenization import TokenInput
from metalens.models.unembed import NO_NORM, NormFunction
from metalens.ops import lens_stats
from metalens.ops.stats import logits_stats
from metalens.readings.reading import Reading, lens_rows, predictions, require_finite, select_layers, select_position
from metalens.utils.arrays import to_list
from metalens.utils.errors import InvalidValueError


def read(
    model: LanguageModel,
    text: TokenInput,
    lens: Lens | None = None,
    top_k: int = 1,
    layers: Sequence[int] | None = None,
    position: int | None = None,
    final_norm: NormFunction | None = None,
    skip_norm: bool = False,
) -> Reading:
    """Everything a lens says about a text: predictions, statistics, and the model's own answer beside them.

    Arguments and errors as in `InterpretableModel.logit_lens`; lens None is the logit lens. At least one layer.
    """
    ids = model.ids(text)[:1]
    chosen = select_layers(layers, model.num_layers)
    if not chosen:
        raise InvalidValueError("No layers were asked for. Pass layers=None for all of them.")
    where = select_position(position, ids.shape[1])
    lens = LogitLens() if lens is None else lens
    check_lens(lens, model, stacklevel=5)
    unembed = model.unembed
    norm = NO_NORM if skip_norm else unembed.norm if final_norm is None else final_norm
    stream = model.source.capture(ids)
    hidden = [h[0, where] for h in stream.hidden]
    stats = lens_stats(lens_rows(hidden, chosen, lens, norm), unembed.head, top_k)
    own = logits_stats(stream.logits[:1, where].astype(mx.float32))
    require_finite(stats)
    strings = model.token_strings(mx.concatenate([stats.top_ids.reshape(-1), own.top_ids.reshape(-1)]))
    names = model.token_strings(ids[0, where])
    tokens = [names[i] for i in to_list(ids[0, where])]
    return Reading(chosen, tokens, predictions(stats, chosen, strings), stats, own, [strings[i] for i in to_list(own.top_ids[0, :, 0])])
