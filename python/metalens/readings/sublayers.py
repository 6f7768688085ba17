"""Read inside the blocks: what attention adds, the middle of the residual stream, and what the feed-forward layer adds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Unpack

import mlx.core as mx

from metalens.lenses.lens import Lens, as_lens, untranslated_layers
from metalens.models.capture import HiddenStates
from metalens.models.language_model import LanguageModel
from metalens.models.sublayers import SUBLAYERS, Sublayer, SublayerStates, capture_sublayers
from metalens.models.tokenization import TokenInput
from metalens.models.unembed import NormFunction  # noqa: F401 - in the type hints of the __init__ that SublayerSource is given
from metalens.readings.cells_reader import part_cells, split_rows
from metalens.readings.numbering import EMBEDDING, Layer
from metalens.readings.rows import lens_rows
from metalens.readings.source import RowSource
from metalens.readings.texts import Texts, are_several
from metalens.readings.trajectory import Trajectory
from metalens.readings.trajectory_reader import TrajectoryOptions, assemble, one_text
from metalens.utils.errors import InvalidValueError


@dataclass(frozen=True, eq=False)
class SublayerSource(RowSource):
    """A text whose rows come from inside the blocks.

    Attributes:
        sublayer: the part of each block that is read.
    """

    sublayer: Sublayer = "middle"

    def rows(self, states: HiddenStates, where: slice) -> mx.array:
        """Return the rows [R, c, D] of some positions. The model runs again: the captured states are those after the blocks.

        Raises:
            InvalidValueError: if the states are those of a part of the text.
        """
        length = states.hidden[0].shape[1]
        if length < self.positions.stop:
            raise InvalidValueError("Sublayers are read from a whole text, and this one is too long for one part. Read a shorter text.")
        return self.inside(capture_sublayers(self.model.source, self.ids[:, :length]), where)

    def inside(self, states: SublayerStates, where: slice) -> mx.array:
        """Return the rows [R, c, D] of some positions of states inside the blocks. Lazy."""
        found = states.of(self.sublayer)
        # Each is read by the translator of its block's input.
        inputs = {layer_before(int(layer)): found[int(layer)][0, where] for layer in self.layers}
        return lens_rows(inputs, list(inputs), self.lens, self.norm).astype(mx.float32)


def layer_before(block: int) -> Layer:
    """Return the layer whose hidden state is the input of a block."""
    return EMBEDDING if block == 0 else block - 1


def read_sublayers(
    model: LanguageModel,
    text: TokenInput | Texts,
    sublayer: Sublayer = "middle",
    lens: Lens | str | Path | None = None,
    **options: Unpack[TrajectoryOptions],
) -> Trajectory | list[Trajectory]:
    """Read a text, or several, inside the blocks.

    Row i belongs to block i. The lens translates it as the input of the block, as tuned-lens's `from_lens_and_cache` does: with the translator of
    block i - 1, or for block 0 with that of the embedding. What attention or the feed-forward layer adds is a part of the stream, so its reading
    says which tokens it speaks for, not what the model would predict.

    Args:
        model: the model.
        text: as in `read_trajectory`.
        sublayer: 'attention' (what it adds), 'middle' (the input of the block plus that), or 'mlp' (what the feed-forward layer adds).
        lens: as in `read_trajectory`.
        options: as in `read_trajectory`, without `embedding`.

    Returns:
        a `Trajectory`, whose lens is named 'logit lens of attention' and so on; for a list of texts a list of them. A text is read in one part.

    Raises:
        InvalidValueError: as `read_trajectory`, and for another sublayer.
        ResidualStreamError: if the model's blocks are not two residual sums, see `metalens.models.sublayers`.
    """
    if sublayer not in SUBLAYERS:
        raise InvalidValueError(f"sublayer must be one of {', '.join(SUBLAYERS)}, got {sublayer!r}.")
    if options.get("embedding"):
        raise InvalidValueError("The embedding has no sublayers: leave embedding out, or use trajectory.")
    lens = as_lens(lens)
    if not are_several(text):
        return _read_one(model, text, sublayer, lens, options)
    given: dict[str, Any] = dict(options)
    found = []
    for i, each in enumerate(text):
        of_text: Any = given | {name: given[name][i] for name in ("targets", "anti_targets") if given.get(name) is not None}
        found.append(_read_one(model, each, sublayer, lens, of_text))
    return found


def _read_one(model: LanguageModel, text: Any, sublayer: Sublayer, lens: Lens, options: TrajectoryOptions) -> Trajectory:
    (source,), request = one_text(model, text, [lens], options)
    fields: dict[str, Any] = {each.name: getattr(source, each.name) for each in dataclass_fields(RowSource)}
    inside, positions = SublayerSource(**fields, sublayer=sublayer), source.positions
    states = capture_sublayers(model.source, source.ids[:, : positions.stop])
    where = slice(positions.start, positions.stop)
    own = model.unembed.norm(states.hidden[-1][0, where]).astype(mx.float32)
    cells = part_cells([inside], request, [inside.inside(states, where)], own)
    trajectory = assemble(inside, request, *split_rows([inside], cells)[0])
    missing = untranslated_layers(lens, [layer_before(int(layer)) for layer in source.layers])
    untranslated = tuple(layer for layer in source.layers if layer_before(int(layer)) in missing)
    return replace(trajectory, lens=f"{trajectory.lens} of {sublayer}", untranslated=untranslated)
