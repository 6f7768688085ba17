"""What metalens can do with a model: found by doing it, on the tiny model of a label."""

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
from metalens.models.unembed import UnembedError
from metalens.ops import lens_stats, normed
from metalens.training.step import loss_and_gradient
from zoo import CONFIGS, build, module_of

IDS = mx.array([[1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5, 4, 3]])
RIGHT = "right"

# Models that give other logits with their own cache than without, whoever runs them.
OTHER_WITH_A_CACHE = {"plamo3"}  # its window is one token longer without the cache


@dataclass(frozen=True)
class Verdict:
    """Of one label: "right" or why not, in the words of the error.

    Attributes:
        float32: everything, with the model as it was built.
        quantized: with mlx-lm's own quantization to 4 bits, groups of 32.
        bfloat16: with the model's parameters in bfloat16.
    """

    float32: str
    quantized: str
    bfloat16: str

    def as_dict(self) -> dict[str, str]:
        """As JSON."""
        return asdict(self)


def examine(label: str) -> Verdict:
    """Everything that the support table says of a label; AssertionError if a result is wrong where nothing was refused."""
    return Verdict(*(_result(label, prepare) for prepare in (_as_built, _quantized, _bfloat16)))


def _result(label: str, prepare: Callable[[nn.Module, str], None]) -> str:
    model = build(label)
    try:
        prepare(model, label)
        plain = model(IDS)
        mx.eval(plain)
    except Exception as error:  # mlx-lm's own code fails: nothing to put a lens on
        return f"mlx-lm: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    try:
        return _examined(label, model, plain, exact=prepare is _as_built)
    except UnembedError as error:
        return f"refused: {_reason(model, str(error))}"


def _reason(model: nn.Module, message: str) -> str:
    """What the message must have said."""
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
    classes = [type(module) for _, module in model.named_modules()]
    unembed = lens_model.unembed
    assert unembed.embedding_rows == unembed.head.tokens == plain.shape[-1]

    # Captured in one pass, without changing the result by a bit, and the model is as it was.
    stream = lens_model.source.capture(IDS)
    assert mx.array_equal(stream.logits, plain)
    assert [type(module) for _, module in model.named_modules()] == classes
    assert mx.array_equal(model(IDS), plain)
    assert all(h.shape == (*IDS.shape, unembed.hidden_dim) for h in stream.hidden)

    # The last block's output read through norm and head is the model's prediction.
    own = plain.astype(mx.float32)
    predicted = lens_model.logit_lens(IDS[:1], layers=[len(stream.hidden) - 1])[len(stream.hidden) - 1]
    best = np.array(mx.max(own[0], axis=-1))
    for position, ((token, _, _),) in enumerate(predicted):
        assert own[0, position, token].item() >= best[position] - (1e-4 if exact else 0.1)
    if exact:
        last = stream.rows(-1)
        stats = lens_stats(normed(last, unembed.norm)[None], unembed.head, 1)
        log_z = mx.logsumexp(own.reshape(-1, own.shape[-1]), axis=-1)
        np.testing.assert_allclose(np.array(stats.lse[0]), np.array(log_z), atol=1e-4)

    # A training step lowers the loss: one along the gradient, so long that the loss must fall by a hundredth of itself if it were linear.
    lens = TunedLens(len(stream.hidden), unembed.hidden_dim)
    losses, gradient = loss_and_gradient(lens, stream, unembed)
    before = mx.mean(losses).item()
    square = sum(mx.sum(mx.square(g)).item() for of_layer in gradient["translators"] for g in of_layer.values())
    for translator, of_layer in zip(lens.translators, gradient["translators"], strict=True):
        for name, g in of_layer.items():
            translator[name] = translator[name] - 0.01 * before / square * g
    after = mx.mean(loss_and_gradient(lens, stream, unembed)[0]).item()
    assert 0.985 * before < after < 0.995 * before

    # Parts of a sequence with the model's own cache give the streams of the whole one.
    if exact:
        parts = list(lens_model.source.chunks(IDS, 3))
        cache = make_prompt_cache(model)
        for part, start in zip(parts, range(0, IDS.shape[1], 3), strict=True):
            assert mx.array_equal(part.logits, model(IDS[:, start : start + 3], cache=cache))
        differences = []
        for i, whole in enumerate(stream.hidden):
            joined = mx.concatenate([part.hidden[i] for part in parts], axis=1)
            differences.append(mx.max(mx.abs(joined - whole)).item() / max(1.0, mx.max(mx.abs(whole)).item()))
        assert (max(differences) > 1e-4) == (module_of(label) in OTHER_WITH_A_CACHE)

    # On the native kernels, which users get on a CPU, the same head is found, and the logits are the same but for rounding.
    with use_backend("native"):
        fast = InterpretableModel(model)
        assert len(fast.acceleration) > 0
        assert fast.unembed.paths == unembed.paths
        spread = mx.max(mx.abs(own - mx.mean(own, axis=-1, keepdims=True))).item()
        assert mx.max(mx.abs(fast(IDS).astype(mx.float32) - own)).item() <= (1e-3 if exact else 0.2) * spread  # mamba in bfloat16 takes 0.13
        fast.acceleration.undo()
    assert [type(module) for _, module in model.named_modules()] == classes
    return RIGHT
