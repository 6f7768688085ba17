"""The precision of the operands of a step's products: a precision that is set, else that of the vocabulary's kind and of Muon."""

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest

from metalens.models.capture import ResidualCapture
from metalens.ops import precision, use_precision
from metalens.training import optimizer, recipe, train_loop
from metalens.training import step as training_step

SETTINGS = {"num_steps": 2, "max_seq_len": 16, "tokens_per_step": 32, "seed": 0, "warm_start_tokens": 0, "guard_tokens": 0, "repeat": True}
IDS = mx.array(np.random.default_rng(3).integers(0, 131, 90))


@pytest.fixture
def seen(monkeypatch):
    """The precisions of the steps so far: of the forward passes, the products with the head, the gradients behind it, and Muon's directions."""
    found = {"capture": set(), "loss": set(), "backward": set(), "muon": set()}

    def recorded(name, original):
        return lambda *args, **kwargs: found[name].add(precision()) or original(*args, **kwargs)

    monkeypatch.delenv("METALENS_PRECISION", raising=False)
    monkeypatch.setattr(ResidualCapture, "capture", recorded("capture", ResidualCapture.capture))
    monkeypatch.setattr(training_step, "lens_kl", recorded("loss", training_step.lens_kl))
    monkeypatch.setattr(training_step, "_backward", recorded("backward", training_step._backward))
    monkeypatch.setattr(optimizer, "muon_direction", recorded("muon", optimizer.muon_direction))
    return found


@pytest.mark.parametrize(
    ("vocabulary", "given", "expected"),
    [
        (40, None, "bfloat16"),
        (40, "float32", "float32"),
        (40, "bfloat16", "bfloat16"),
        ("full", None, "float32"),
        ("full", "float32", "float32"),
        ("full", "bfloat16", "bfloat16"),
    ],
)
@pytest.mark.parametrize("by", ["variable", "block"])
def test_a_precision_that_is_set_goes_before_that_of_samples_and_of_muon(tiny, seen, monkeypatch, by, vocabulary, given, expected):
    if by == "variable" and given is not None:
        monkeypatch.setenv("METALENS_PRECISION", given)
    with use_precision(given) if by == "block" and given is not None else nullcontext():
        train_loop(tiny.source, tiny.unembed, IDS, recipe("muon", **SETTINGS, vocabulary=vocabulary))
    assert seen == {"capture": {expected}, "loss": {expected}, "backward": {expected}, "muon": {given or "bfloat16"}}
