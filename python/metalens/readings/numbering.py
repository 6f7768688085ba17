"""Numbers and names of layers.

Layer i is the output of block i, 0 <= i < L. The embedding's output, which is the input of block 0, is the layer 'embedding'.

tuned-lens numbers the inputs of the blocks: its layer 0 is the embedding, its layer i the output of block i - 1, and it has no lens for the
output of the last block, which is the model itself. `upstream_layer` and `layer_of_upstream` convert; nothing else in metalens uses its numbers.
"""

from __future__ import annotations

from metalens.models.layers import EMBEDDING, Layer
from metalens.utils.errors import InvalidValueError

__all__ = ["EMBEDDING", "UNTRANSLATED", "Layer", "layer_name", "layer_of_upstream", "upstream_layer"]

# The meaning of the star in `layer_name`.
UNTRANSLATED = "*: no translator of this layer; read as by the logit lens"


def layer_name(layer: Layer, translated: bool = True) -> str:
    """Return the name of a layer's row: 'layer 3' or 'embedding', with a star if the lens does not translate it."""
    return f"{layer if layer == EMBEDDING else f'layer {layer}'}{'' if translated else '*'}"


def upstream_layer(layer: Layer) -> int:
    """Return tuned-lens's number of a layer: 0 for the embedding, i + 1 for the output of block i."""
    return 0 if layer == EMBEDDING else int(layer) + 1


def layer_of_upstream(number: int) -> Layer:
    """Return the layer that tuned-lens gives this number.

    Raises:
        InvalidValueError: if the number is negative.
    """
    if number < 0:
        raise InvalidValueError(f"tuned-lens numbers layers from 0, the embedding; there is no layer {number}.")
    return EMBEDDING if number == 0 else number - 1
