"""Tell one text from several."""

from __future__ import annotations

from typing import Any, TypeAlias, TypeGuard

import mlx.core as mx
import numpy as np

from metalens.models.tokenization import TokenInput

# Several texts: a list of strings, of lists of ids, or of arrays of ids [T].
Texts: TypeAlias = list[str] | tuple[str, ...] | list[list[int]] | list[mx.array]


def are_several(text: TokenInput | Texts) -> TypeGuard[Texts]:
    """Return whether the input is a list of texts. An array of ids is one text, also [B, T]."""
    return isinstance(text, (list, tuple)) and len(text) > 0 and all(_is_text(each) for each in text)


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, list, tuple)) or (isinstance(value, (mx.array, np.ndarray)) and value.ndim > 0)
