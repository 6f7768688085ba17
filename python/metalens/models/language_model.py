"""A frozen language model: its module, its tokenizer, its hidden states, its final norm and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import mlx.nn as nn

from metalens.models.acceleration import Acceleration, accelerate
from metalens.models.bundled import path_of
from metalens.models.capture import Edit, HiddenStates, ResidualCapture
from metalens.models.loading import load
from metalens.models.probe import Overrides
from metalens.models.tokenization import TokenInput, TokenizerMixin
from metalens.models.unembed import LogitTransform, NormFunction, Unembed
from metalens.ops.backends import native_by_default
from metalens.utils.errors import InvalidTypeError

DEFAULT_SEQUENCE = 512  # tokens


class LanguageModel(TokenizerMixin):
    """A frozen language model, ready for lenses.

    Args:
        model: an `mlx.nn.Module` called as model(ids), or a name: a local path, a hub id that `mlx_lm.load` opens, or 'demo' for the bundled model.
        tokenizer: an object with `encode` and `decode`. None = the loaded model's own.
        layer_attr: the name or dotted path of the list of blocks.
        embedding_path, norm_path, lm_head_path: dotted paths that replace the modules that the model is seen to call.
        norm, head: modules that replace them.
        logit_transform: what the model does to its logits. None = find out.
        accelerate: run the model's layers on the native CPU kernels. 'auto' = where the default device is a CPU and the kernels are available.

    Attributes:
        model: the wrapped module.
        name: the name that it was loaded from. None = it came as a module.
        tokenizer: may be None; then only token ids are accepted.
        source: captures the model's hidden states.
        overrides: the caller's modules and paths.
        acceleration: what was switched to the native kernels; `acceleration.undo()` switches it back.

    Raises:
        InvalidValueError: if `model` names nothing that can be loaded.
        InvalidTypeError: if it is no module.
        AttributeError: if no list of blocks is found.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        tokenizer: Any = None,
        layer_attr: str = "layers",
        embedding_path: str | None = None,
        norm_path: str | None = None,
        lm_head_path: str | None = None,
        *,
        norm: NormFunction | None = None,
        head: nn.Module | None = None,
        logit_transform: LogitTransform | None = None,
        accelerate: bool | Literal["auto"] = "auto",
    ) -> None:
        self.name = path_of(str(model)) if isinstance(model, (str, Path)) else None
        if self.name is not None:
            model, loaded = load(self.name)
            tokenizer = tokenizer if tokenizer is not None else loaded
        if not isinstance(model, nn.Module):
            raise InvalidTypeError(f"A model must be an mlx.nn.Module, a path or a hub id, not {type(model).__name__}.")
        self.model = model
        self.tokenizer = tokenizer
        self.source = ResidualCapture(model, layer_attr)
        self.overrides = Overrides(embedding_path, norm_path if norm is None else norm, lm_head_path if head is None else head)
        self._logit_transform = logit_transform
        self.acceleration = _accelerated(model, accelerate)

    @cached_property
    def unembed(self) -> Unembed:
        """Return the model's norm and head, found at first use. They have reproduced the model's own logits (`UnembedError` if they do not)."""
        return Unembed.from_model(self.source, self.overrides, self._logit_transform)

    @property
    def num_layers(self) -> int:
        """Return L, the number of blocks."""
        return len(self.source)

    @property
    def embedding_rows(self) -> int:
        """Return how many token ids the model knows: 0 <= id < embedding_rows."""
        return self.unembed.embedding_rows

    @property
    def default_sequence_length(self) -> int:
        """Return the default tokens per sequence: 512, or the model's context if that is shorter."""
        return min(DEFAULT_SEQUENCE, int(getattr(getattr(self.model, "args", None), "max_position_embeddings", None) or DEFAULT_SEQUENCE))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped model."""
        return self.model(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {self.num_layers} layers, tokenizer {'✓' if self.tokenizer is not None else '✗'})"

    def capture(self, text: TokenInput | Sequence[str], edits: Mapping[int, Edit] | None = None) -> HiddenStates:
        """Capture the output of every block [B, T, D] in one forward pass. The padding of several texts is masked.

        Args:
            text: one text, several texts, or token ids.
            edits: for some blocks, a function of the output [B, T, D] that gives its replacement.
        """
        ids, mask = self.ids_and_mask(text)
        return self.source.capture(ids, edits, mask)


def _accelerated(model: nn.Module, wanted: bool | Literal["auto"]) -> Acceleration:
    return accelerate(model) if wanted is True or (wanted == "auto" and native_by_default()) else Acceleration([])
