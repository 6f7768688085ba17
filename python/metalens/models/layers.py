"""The names of layers.

Layer i is the output of block i, 0 <= i < L. The embedding's output, which is the input of block 0, is the layer 'embedding'.
`metalens.readings.numbering` has their labels, and tuned-lens's numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, TypeAlias

EMBEDDING: Final = "embedding"
Layer: TypeAlias = int | Literal["embedding"]


def layers_in_order(blocks: int | Iterable[int], embedding: bool = True) -> list[Layer]:
    """Return the layers of a model, from the input to the output: 'embedding', if it is wanted, then blocks.

    Args:
        blocks: the blocks, or the number of all.
        embedding: whether the embedding's output is among the layers.
    """
    found: list[Layer] = [EMBEDDING] if embedding else []
    return [*found, *(range(blocks) if isinstance(blocks, int) else blocks)]
