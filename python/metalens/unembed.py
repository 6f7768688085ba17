"""Unembed: from a residual stream to logits, as the model itself does it: final norm, head, logit transform.

Found in the model by the names that mlx-lm uses, then checked against the model's own logits: a norm, a scale or a softcap that was missed would make
every lens wrong without a sign of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalens.accelerate import weight_of
from metalens.arrays import number
from metalens.ops import Head, Norm, head_logits
from metalens.stream import StreamSource, follow

WRAPPERS = ("", "model.", "model.model.", "language_model.", "language_model.model.", "model.language_model.", "backbone.", "transformer.")
EMBEDDINGS = ("embed_tokens", "tok_embeddings", "wte", "embed_in", "embeddings", "word_embeddings", "embeddings.word_embeddings")
NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "embedding_norm", "final_norm")
HEADS = ("lm_head", "embed_out", "output", "head")

NormFunction = Callable[[mx.array], mx.array]

# The norm of a model without one, or of a lens told to skip it.
NO_NORM = Norm(lambda h: h, "none")


def norm_of(module: nn.Module) -> Norm:
    """A module of the model as the operations take it. Exact types only: a subclass computes something of its own."""
    if type(module) is nn.RMSNorm:
        return Norm(module, "rms", module["weight"], None, module.eps)
    if type(module) is nn.LayerNorm:
        return Norm(module, "layer", module.get("weight"), module.get("bias"), module.eps)
    return Norm(module)


@dataclass(frozen=True)
class Located:
    """A module and the dotted path where it was found."""

    module: Any
    path: str


def locate(model: Any, names: Sequence[str], override: str | None, what: str) -> Located | None:
    """The first module found under `names` in any wrapper, or at `override`. A wrong override warns and falls back, as in mlxterp."""
    if override is not None:
        module = follow(model, override)
        if module is not None:
            return Located(module, override)
        warnings.warn(f"No {what} at the given path {override!r}; looking in the usual places instead.", UserWarning, stacklevel=4)
    for name in names:
        for wrapper in WRAPPERS:
            module = follow(model, wrapper + name)
            if callable(module) and isinstance(module, nn.Module):
                return Located(module, wrapper + name)
    return None


def paths_tried(names: Sequence[str]) -> list[str]:
    """For error messages."""
    return [wrapper + name for name in names for wrapper in WRAPPERS]


def _transform(model: Any) -> tuple[float, float | None]:
    """(scale, softcap) of the model's logits, by the names that mlx-lm's configurations give them."""
    scale, softcap = 1.0, None
    for args in (getattr(model, "args", None), getattr(getattr(model, "language_model", None), "args", None), getattr(model, "config", None)):
        if args is None:
            continue
        scale = float(getattr(args, "logit_scale", None) or 1.0) / float(getattr(args, "logits_scaling", None) or 1.0)
        softcap = getattr(args, "final_logit_softcapping", None)
        if scale != 1.0 or softcap:
            break
    return scale, float(softcap) if softcap else None


class Unembed:
    """Norm and head of one model.

    Attributes:
        norm: the final norm, a callable on [..., D].
        head: the unembedding's arrays.
        paths: where embedding, norm and head were found ("" for none).
        tied: whether the head is the embedding.
        embedding_rows: token ids that the model knows, 0 <= id < embedding_rows; the head's rows if no embedding was found.
    """

    def __init__(self, norm: Norm, head: Head, paths: dict[str, str], tied: bool, embedding_rows: int) -> None:
        self.norm = norm
        self.head = head
        self.paths = paths
        self.tied = tied
        self.embedding_rows = embedding_rows

    @classmethod
    def from_model(
        cls, model: nn.Module, embedding_path: str | None = None, norm_path: str | None = None, lm_head_path: str | None = None
    ) -> Unembed:
        """Find the model's final norm and output head.

        Raises:
            AttributeError: if there is neither a head nor an embedding that could be one.
        """
        embedding = locate(model, EMBEDDINGS, embedding_path, "embedding")
        norm = locate(model, NORMS, norm_path, "final norm")
        head = locate(model, HEADS, lm_head_path, "output head")
        projection = head or embedding
        if projection is None or "weight" not in projection.module:
            raise AttributeError(
                "Cannot find output projection layer. Model must have either 'lm_head' or weight-tied embeddings. "
                f"Tried paths: {paths_tried([*HEADS, *EMBEDDINGS])}. Use embedding_path or lm_head_path to say where it is."
            )
        if norm is None:
            warnings.warn(
                f"Could not find the final norm; decoding without it. Tried paths: {paths_tried(NORMS)}. Use norm_path to say where it is.",
                UserWarning,
                stacklevel=3,
            )
        scale, softcap = _transform(model)
        weight = weight_of(projection.module)
        found = Head(weight, projection.module.get("bias"), scale, softcap)
        paths = {name: place.path if place else "" for name, place in (("embedding", embedding), ("norm", norm), ("head", head))}
        rows = weight_of(embedding.module).shape[0] if embedding and "weight" in embedding.module else found.vocab_size
        return cls(norm_of(norm.module) if norm else NO_NORM, found, paths, head is None, rows)

    @property
    def hidden_dim(self) -> int:
        """D: the width of the residual stream."""
        return self.head.weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """V: rows of the head, whatever the tokenizer says."""
        return self.head.vocab_size

    def __call__(self, h: mx.array) -> mx.array:
        """Logits [..., V] float32 of a residual stream [..., D]."""
        return head_logits(self.norm(h), self.head)

    def check(self, source: StreamSource) -> None:
        """Compare with the model's own logits on a few tokens.

        Raises:
            ValueError: if unembedding the last block's output does not reproduce them, with the difference and what to do.
        """
        ids = mx.arange(min(8, self.vocab_size))[None]
        stream = source.capture(ids)
        own = stream.logits.astype(mx.float32)
        where = f"the norm at {self.paths['norm']!r} and the head at {self.paths['head'] or self.paths['embedding']!r}"
        width = stream.hidden[-1].shape[-1]
        if width != self.hidden_dim:
            raise ValueError(f"The model's residual stream is {width} wide; {where} would need {self.hidden_dim}.{_ADVICE}")
        ours = self(stream.hidden[-1])
        if ours.shape != own.shape:
            raise ValueError(f"With {where} the logits are {ours.shape}; the model's are {own.shape}.{_ADVICE}")
        if number(mx.any(mx.isnan(own))):
            raise ValueError("The model's own logits are NaN on ordinary tokens: its weights are damaged. Load or convert the model again.")
        # 16-bit logits carry 8 bits; a missed norm or scale is off by far more than one part in 20.
        difference = number(mx.max(mx.abs(ours - own)))
        spread = number(mx.max(mx.abs(own - mx.mean(own, axis=-1, keepdims=True))))
        if not difference <= 0.05 * spread + 1e-4:
            raise ValueError(
                f"The model's logits do not follow from its last block's output with {where}: they are off by up to {difference:.3g}, "
                f"where the logits spread over {spread:.3g}.{_ADVICE}"
            )


_ADVICE = " Say where the model keeps them with norm_path, lm_head_path and embedding_path."
