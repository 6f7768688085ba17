"""Examine the tiny model of a label: do with it all that metalens does with a model."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import quantize_model

from metalens import InterpretableModel, TunedLens, use_backend
from metalens.models.architectures import REASONS, model_type
from metalens.models.capture import HiddenStates
from metalens.models.unembed import UnembedError
from metalens.ops import lens_stats, normed
from metalens.training.step import loss_and_gradient
from zoo import CONFIGS, build, module_of

IDS = mx.array([[1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5, 4, 3]])
RIGHT = "right"

# Models of mlx-lm that give other logits with their own cache than without it.
OTHER_WITH_A_CACHE = {"plamo3"}  # its window is one token longer without the cache


@dataclass(frozen=True)
class Verdict:
    """The results of one label: "right", or the words of the error.

    Attributes:
        float32: everything, with the model as it was built.
        quantized: with mlx-lm's own quantization to 4 bits, groups of 32.
        bfloat16: with the model's parameters in bfloat16.
    """

    float32: str
    quantized: str
    bfloat16: str

    def as_dict(self) -> dict[str, str]:
        """Return the fields, for JSON."""
        return asdict(self)


def examine(label: str) -> Verdict:
    """Return the row of the support table for a label (AssertionError if a model that is not refused gives a wrong result)."""
    return Verdict(*(_result(label, prepare) for prepare in (_as_built, _quantized, _bfloat16)))


def _result(label: str, prepare: Callable[[nn.Module, str], None]) -> str:
    model = build(label)
    try:
        prepare(model, label)
        plain = model(IDS)
        mx.eval(plain)
    except Exception as error:  # mlx-lm's own code fails, so there is nothing to examine
        return f"mlx-lm: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    try:
        return _examined(label, model, plain, exact=prepare is _as_built)
    except UnembedError as error:
        return f"refused: {_reason(model, str(error))}"


def _reason(model: nn.Module, message: str) -> str:
    """Return the reason for a refusal, which the message must contain."""
    reason = REASONS[model_type(model)]
    assert reason in message
    return reason


def _as_built(model: nn.Module, label: str) -> None:
    pass


def _quantized(model: nn.Module, label: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        quantize_model(model, copy.deepcopy(CONFIGS[label]), 32, 4)


def _bfloat16(model: nn.Module, label: str) -> None:
    cast = getattr(model, "cast_predicate", lambda name: True)
    model.update(
        tree_map_with_path(lambda name, p: p.astype(mx.bfloat16) if cast(name) and mx.issubdtype(p.dtype, mx.floating) else p, model.parameters())
    )


def _examined(label: str, model: nn.Module, plain: mx.array, exact: bool) -> str:
    lens_model = InterpretableModel(model, accelerate=False)
    _ = lens_model.unembed  # UnembedError if the model is refused
    classes = _classes(model)
    states = lens_model.source.capture(IDS)
    _require_an_unchanged_model(lens_model, states, plain, classes)
    _require_the_models_prediction(lens_model, states, plain, exact)
    _require_a_lower_loss(lens_model, states)
    if exact:
        _require_equal_chunks(label, lens_model, states)
    _require_equal_native_logits(lens_model, plain, exact)
    assert _classes(model) == classes
    return RIGHT


def _classes(model: nn.Module) -> list[type]:
    return [type(module) for _, module in model.named_modules()]


def _require_an_unchanged_model(lens_model: InterpretableModel, states: HiddenStates, plain: mx.array, classes: list[type]) -> None:
    """One pass captures all hidden states. It does not change the logits by a bit, and leaves the model as it was."""
    unembed, model = lens_model.unembed, lens_model.model
    assert unembed.embedding_rows == unembed.head.tokens == plain.shape[-1]
    assert mx.array_equal(states.logits, plain)
    assert _classes(model) == classes
    assert mx.array_equal(model(IDS), plain)
    assert all(h.shape == (*IDS.shape, unembed.hidden_dim) for h in states.hidden)


def _require_the_models_prediction(lens_model: InterpretableModel, states: HiddenStates, plain: mx.array, exact: bool) -> None:
    """The logit lens of the last block is the model's own prediction."""
    own, last = plain.astype(mx.float32), len(states.hidden) - 1
    predicted = lens_model.logit_lens(IDS[:1], layers=[last])[last]
    best = np.array(mx.max(own[0], axis=-1))
    for position, ((token, _, _),) in enumerate(predicted):
        assert own[0, position, token].item() >= best[position] - (1e-4 if exact else 0.1)
    if exact:
        unembed = lens_model.unembed
        stats = lens_stats(normed(states.rows(-1), unembed.norm)[None], unembed.head, 1)
        log_z = mx.logsumexp(own.reshape(-1, own.shape[-1]), axis=-1)
        np.testing.assert_allclose(np.array(stats.lse[0]), np.array(log_z), atol=1e-4)


def _require_a_lower_loss(lens_model: InterpretableModel, states: HiddenStates) -> None:
    """A training step along the gradient lowers the loss. Its length would lower a linear loss by one hundredth."""
    lens = TunedLens(len(states.hidden), lens_model.unembed.hidden_dim)
    losses, gradient = loss_and_gradient(lens, states, lens_model.unembed)
    before = mx.mean(losses).item()
    square = sum(mx.sum(mx.square(g)).item() for of_layer in gradient["translators"] for g in of_layer.values())
    for translator, of_layer in zip(lens.translators, gradient["translators"], strict=True):
        for name, g in of_layer.items():
            translator[name] = translator[name] - 0.01 * before / square * g
    after = mx.mean(loss_and_gradient(lens, states, lens_model.unembed)[0]).item()
    assert 0.985 * before < after < 0.995 * before


def _require_equal_chunks(label: str, lens_model: InterpretableModel, states: HiddenStates) -> None:
    """Chunks of a sequence, with the model's own cache, give the hidden states of the whole."""
    chunks = list(lens_model.source.chunks(IDS, 3))
    cache = make_prompt_cache(lens_model.model)
    for chunk, start in zip(chunks, range(0, IDS.shape[1], 3), strict=True):
        assert mx.array_equal(chunk.logits, lens_model(IDS[:, start : start + 3], cache=cache))
    differences = []
    for i, whole in enumerate(states.hidden):
        joined = mx.concatenate([chunk.hidden[i] for chunk in chunks], axis=1)
        differences.append(mx.max(mx.abs(joined - whole)).item() / max(1.0, mx.max(mx.abs(whole)).item()))
    assert (max(differences) > 1e-4) == (module_of(label) in OTHER_WITH_A_CACHE)


def _require_equal_native_logits(lens_model: InterpretableModel, plain: mx.array, exact: bool) -> None:
    """The native kernels, which users get on a CPU, give the same head, and the same logits within rounding."""
    own = plain.astype(mx.float32)
    with use_backend("native"):
        fast = InterpretableModel(lens_model.model)
        assert len(fast.acceleration) > 0
        assert fast.unembed.paths == lens_model.unembed.paths
        spread = mx.max(mx.abs(own - mx.mean(own, axis=-1, keepdims=True))).item()
        assert mx.max(mx.abs(fast(IDS).astype(mx.float32) - own)).item() <= (1e-3 if exact else 0.2) * spread  # mamba in bfloat16 takes 0.13
        fast.acceleration.undo()
