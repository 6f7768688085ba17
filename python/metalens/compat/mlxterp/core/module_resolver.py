"""mlxterp.core.module_resolver: mlxterp goes by names, metalens by what the model is seen to call."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from metalens.models.capture import ResidualCapture, ResidualStreamError
from metalens.models.probe import FoundModule, Overrides, find_head_modules

__all__ = ["ModuleResolver", "find_layer_key_pattern", "normalize_layer_key"]


class ModuleResolver:
    """Finds a model's embedding, final norm and output head.

    Args:
        model: the wrapped module.
        embedding_path, norm_path, lm_head_path: dotted paths that go before what the model calls.
    """

    def __init__(self, model: Any, embedding_path: Any = None, norm_path: Any = None, lm_head_path: Any = None) -> None:
        self.model = model
        self._places = Overrides(embedding_path, norm_path, lm_head_path)
        self._found: dict[str, FoundModule | None] | None = None

    def _find(self, what: str) -> FoundModule | None:
        if self._found is None:
            try:
                parts = find_head_modules(ResidualCapture(self.model), self._places)
                self._found = {"embedding": parts.embedding, "norm": parts.norm, "head": parts.head}
            except (AttributeError, ResidualStreamError):  # no blocks
                self._found = dict.fromkeys(("embedding", "norm", "head"))
        return self._found[what]

    def get_embedding_layer(self) -> Any:
        """The embedding module, or None."""
        found = self._find("embedding")
        return found.module if found else None

    def get_embedding_path(self) -> str | None:
        """Where the embedding was found."""
        found = self._find("embedding")
        return found.path if found else None

    def get_final_norm(self) -> Any:
        """The final norm, or None."""
        found = self._find("norm")
        return found.module if found else None

    def get_final_norm_path(self) -> str | None:
        """Where the final norm was found."""
        found = self._find("norm")
        return found.path if found else None

    def get_lm_head(self) -> Any:
        """The output projection: the head, else the tied embedding, else None."""
        return self.get_output_projection()[0]

    def get_output_projection(self) -> tuple[Any, str | None, bool]:
        """(module, path, whether it is the tied embedding); (None, None, False) if there is neither."""
        head, embedding = self._find("head"), self._find("embedding")
        found = head or embedding
        return (found.module, found.path, embedding is not None and found.module is embedding.module) if found else (None, None, False)

    def clear_cache(self) -> None:
        """Search again at the next call, after the model has changed."""
        self._found = None


def normalize_layer_key(key: str) -> str:
    """An activation's name without the leading "model.model." or "model."."""
    return re.sub(r"^model\.(model\.)?", "", key)


def find_layer_key_pattern(activations: Iterable[str], layer_idx: int, component: str | None = None) -> str | None:
    """The name in `activations` of a block's output, or of a component of it; None if it is not there.

    The plainest name wins: "layers.3" or "h.3" below as few prefixes as possible.
    """
    suffix = f".{component}" if component else ""
    wanted = re.compile(rf"(?:^|\.)(?:layers|h)\.{layer_idx}{re.escape(suffix)}$")
    return min((key for key in activations if wanted.search(key)), key=lambda key: (key.count("."), key), default=None)
