"""The names of layers.

Layer i is the output of block i, 0 <= i < L. The embedding's output, which is the input of block 0, is the layer 'embedding'.
`metalens.readings.numbering` has their labels, and tuned-lens's numbers.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

EMBEDDING: Final = "embedding"
Layer: TypeAlias = int | Literal["embedding"]
