"""A frozen language model: its module, its tokenizer, its hidden states, its final norm and head."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from metalens.models.acceleration import Acceleration, accelerate, reason_for_plain_mlx
from metalens.models.blocks import follow
from metalens.models.capture import BlockEdit, Edit, HiddenStates, ResidualCapture
from metalens.models.loading import load, load_part
from metalens.models.probe import GIVEN, Overrides
from metalens.models.registry import path_of
from metalens.models.sharding import Processes, Sharding, require_processes
from metalens.models.tokenization import TokenBatch, TokenInput, Tokenization
from metalens.models.unembed import LogitTransform, NormFunction, Unembed, checked_transform
from metalens.models.weights import Snapshot, arrays_of, weights_hash
from metalens.utils.errors import InvalidTypeError, InvalidValueError

DEFAULT_SEQUENCE = 512  # tokens


class LanguageModel(Tokenization):
    """A frozen language model, ready for lenses.

    Args:
        model: an `mlx.nn.Module` called as model(ids), or a name, as in `metalens.models.loading.load`.
        tokenizer: an object with `encode` and `decode`. None = the loaded model's own.
        layer_attr: the name or dotted path of the list of blocks.
        embedding_path, norm_path, lm_head_path: dotted paths of modules to use instead of those that the model is observed to call.
        norm, head: a final norm and an output head to use instead of them.
        logit_transform: what the model does to its logits. None = find out.
        tensor_group: a `metalens.training.Group` whose processes hold a part of the model each (tensor parallelism); all must make the same calls.
            None = this process loads the whole model.
        accelerate: run the model's layers on the native CPU kernels, in place. 'auto' = if the default device is a CPU and the kernels are available.

    Attributes:
        model: the wrapped module.
        name: the path or hub id that it was loaded from. None = the caller gave a module.
        tokenizer: the tokenizer. None = only token ids are accepted.
        source: captures the model's hidden states.
        overrides: the modules and paths that the caller gave.
        acceleration: the layers that were switched to the native kernels; `acceleration.undo()` switches them back.

    Raises:
        InvalidValueError: if `model` is a name and mlx-lm cannot load it, or cannot divide it among the processes.
        InvalidTypeError: if `model` is neither a module nor a name, `tensor_group` is no group, or `logit_transform` is no LogitTransform.
        LayersNotFoundError: if no list of blocks is found.
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
        tensor_group: Processes | None = None,
        accelerate: bool | Literal["auto"] = "auto",
    ) -> None:
        self.name, sharding = None, None
        if tensor_group is not None:
            require_processes(tensor_group)
        if isinstance(model, (str, Path)):
            with nullcontext() if tensor_group is None else tensor_group.together():
                self.name = path_of(str(model), make=True)
        elif tensor_group is not None:
            raise InvalidValueError("tensor_group divides a model while it is loaded: give the model's folder or hub id, not a module.")
        if self.name is not None:
            if tensor_group is None or tensor_group.size == 1:
                model, loaded = load(self.name)
            else:
                model, loaded, sharding = load_part(self.name, tensor_group)
            tokenizer = tokenizer if tokenizer is not None else loaded
        if not isinstance(model, nn.Module):
            raise InvalidTypeError(f"A model must be an mlx.nn.Module, a path or a hub id, not {type(model).__name__}.")
        self.model = model
        self.tokenizer = tokenizer
        self.source = ResidualCapture(model, layer_attr, sharding)
        self.overrides = Overrides(embedding_path, norm_path if norm is None else norm, lm_head_path if head is None else head)
        self._logit_transform = checked_transform(logit_transform)
        self.acceleration = _accelerated(model, accelerate)
        self._found: tuple[Unembed, Snapshot] | None = None
        self._hashed: tuple[str, Snapshot] | None = None
        if sharding is not None:
            _ = self.unembed  # its check is a forward pass, which all processes must make at the same time

    @property
    def sharding(self) -> Sharding | None:
        """Return how the model is divided among processes. None = this process has all of it."""
        return self.source.sharding

    @property
    def unembed(self) -> Unembed:
        """Return the model's final norm and head. They are found at the first use, and checked against the model's own logits.

        If the model has got other arrays for them since (by training, quantization or an adapter), they are found and checked again, and layers that
        are new are accelerated like the others. Arrays that were changed in place are not checked again.

        Raises:
            UnembedError: if they are not found, or do not give these logits.
        """
        if self._found is not None:
            unembed, snapshot = self._found
            if snapshot.matches(self._output_arrays(unembed)):
                return unembed
            self._accelerate_new_layers()
        unembed = Unembed.from_model(self.source, self.overrides, self._logit_transform)
        self._found = (unembed, Snapshot(self._output_arrays(unembed)))
        return unembed

    def _output_arrays(self, unembed: Unembed) -> list[mx.array]:
        """Return the arrays that the model has now at the places where its embedding, norm and head were found."""
        found: list[mx.array] = []
        for name, path in unembed.paths.items():
            found += arrays_of(getattr(self.overrides, name) if path == GIVEN else follow(self.model, path) if path else None)
        return found

    def _accelerate_new_layers(self) -> None:
        """Switch layers that have come since to the native kernels, if the others run there."""
        if len(self.acceleration):
            self.acceleration.include(accelerate(self.model))

    @property
    def weights_hash(self) -> str:
        """Return the hash of all weights of the model: see `metalens.models.weights.weights_hash`. A divided model has that of its files."""
        if self.sharding is not None:
            return self.sharding.weights_hash
        arrays = arrays_of(self.model)
        if self._hashed is None or not self._hashed[1].matches(arrays):
            self._hashed = (weights_hash(self.model), Snapshot(arrays))
        return self._hashed[0]

    @property
    def num_layers(self) -> int:
        """Return L, the number of blocks."""
        return len(self.source)

    @property
    def embedding_rows(self) -> int:
        """Return the number of token ids that the model knows: 0 <= id < embedding_rows."""
        return self.unembed.embedding_rows

    @property
    def context(self) -> int | None:
        """Return the tokens per sequence that the model was made for. None = it does not say."""
        return self.source.context

    @property
    def default_sequence_length(self) -> int:
        """Return the default tokens per sequence: 512, or the model's context if that is shorter."""
        return min(DEFAULT_SEQUENCE, self.context or DEFAULT_SEQUENCE)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped model."""
        return self.model(*args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {self.num_layers} layers, tokenizer {'✓' if self.tokenizer is not None else '✗'})"

    def capture(self, text: TokenInput | TokenBatch, edits: Mapping[int, Edit | BlockEdit] | None = None) -> HiddenStates:
        """Capture the output of every block [B, T, D] in one forward pass. The padding of several texts is masked.

        Args:
            text: one text, several texts, or token ids.
            edits: {block: function of its output [B, T, D] that returns the output to use instead, or a `BlockEdit`}.
        """
        ids, mask = self.ids_and_mask(text)
        return self.source.capture(ids, edits, mask)


def _accelerated(model: nn.Module, wanted: bool | Literal["auto"]) -> Acceleration:
    if wanted == "auto":
        reason = reason_for_plain_mlx()
        return Acceleration([], reason) if reason else accelerate(model)
    return accelerate(model) if wanted else Acceleration([], "accelerate=False")
