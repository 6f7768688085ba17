"""The names of mlxterp.core.module_resolver. mlxterp finds modules by their names; here they are the modules that the model calls."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from metalens.models.capture import ResidualCapture, ResidualStreamError
from metalens.models.probe import FoundModule, Overrides, find_head_modules

__all__ = ["ModuleResolver", "find_layer_key_pattern", "normalize_layer_key"]


class ModuleResolver:
    """Finds a model's embedding, final norm and output head."""

    def __init__(self, model: Any, embedding_path: Any = None, norm_path: Any = None, lm_head_path: Any = None) -> None:
        """Prepare the search; it runs at the first question.

        Args:
            model: the wrapped module.
            embedding_path, norm_path, lm_head_path: dotted paths that replace the modules that the model calls.
        """
        self.model = model
        self._overrides = Overrides(embedding_path, norm_path, lm_head_path)
        self._found: dict[str, FoundModule | None] | None = None

    def _find(self, what: str) -> FoundModule | None:
        if self._found is None:
            try:
                modules = find_head_modules(ResidualCapture(self.model), self._overrides)
                self._found = {"embedding": modules.embedding, "norm": modules.norm, "head": modules.head}
            except (AttributeError, ResidualStreamError):  # the model has no blocks
                self._found = dict.fromkeys(("embedding", "norm", "head"))
        return self._found[what]

    def get_embedding_layer(self) -> Any:
        """Return the embedding module, or None."""
        found = self._find("embedding")
        return found.module if found else None

    def get_embedding_path(self) -> str | None:
        """Return the dotted path of the embedding, or None."""
        found = self._find("embedding")
        return found.path if found else None

    def get_final_norm(self) -> Any:
        """Return the final norm, or None."""
        found = self._find("norm")
        return found.module if found else None

    def get_final_norm_path(self) -> str | None:
        """Return the dotted path of the final norm, or None."""
        found = self._find("norm")
        return found.path if found else None

    def get_lm_head(self) -> Any:
        """Return the output projection: the head, else the tied embedding, else None."""
        return self.get_output_projection()[0]

    def get_output_projection(self) -> tuple[Any, str | None, bool]:
        """Return (module, path, whether it is the tied embedding); (None, None, False) if there is neither head nor embedding."""
        head, embedding = self._find("head"), self._find("embedding")
        found = head or embedding
        return (found.module, found.path, embedding is not None and found.module is embedding.module) if found else (None, None, False)

    def clear_cache(self) -> None:
        """Search again at the next question. Call this after the model has changed."""
        self._found = None


def normalize_layer_key(key: str) -> str:
    """Return an activation's name without the leading "model.model." or "model."."""
    return re.sub(r"^model\.(model\.)?", "", key)


def find_layer_key_pattern(activations: Iterable[str], layer_idx: int, component: str | None = None) -> str | None:
    """Return the name in `activations` of a block's output, or of a component of the block; None if there is none.

    Of several names, the one with the fewest prefixes before "layers.3" or "h.3" is returned.
    """
    suffix = f".{component}" if component else ""
    wanted = re.compile(rf"(?:^|\.)(?:layers|h)\.{layer_idx}{re.escape(suffix)}$")
    return min((key for key in activations if wanted.search(key)), key=lambda key: (key.count("."), key), default=None)
