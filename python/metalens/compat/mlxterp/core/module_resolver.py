"""mlxterp.core.module_resolver, on metalens's own search."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from metalens.unembed import EMBEDDINGS, HEADS, NORMS, Located, locate

__all__ = ["ModuleResolver", "find_layer_key_pattern", "normalize_layer_key"]


class ModuleResolver:
    """Finds a model's embedding, final norm and output head.

    Args:
        model: the wrapped module.
        embedding_path, norm_path, lm_head_path: dotted paths that go before the usual places.
    """

    def __init__(self, model: Any, embedding_path: str | None = None, norm_path: str | None = None, lm_head_path: str | None = None) -> None:
        self.model = model
        self._overrides = {"embedding": embedding_path, "norm": norm_path, "head": lm_head_path}
        self._found: dict[str, Located | None] = {}

    def _find(self, what: str) -> Located | None:
        if what not in self._found:
            names = {"embedding": EMBEDDINGS, "norm": NORMS, "head": HEADS}[what]
            self._found[what] = locate(self.model, names, self._overrides[what], what)
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
        if head is not None:
            return head.module, head.path, False
        if embedding is not None:
            return embedding.module, embedding.path, True
        return None, None, False

    def clear_cache(self) -> None:
        """Search again at the next call, after the model has changed."""
        self._found.clear()


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
