"""Test the launch code of a Mac in emulation, from model to trained lens: losses, gradients and readings equal the reference's."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import cohere, gemma2

import mslcpu
from metalens import InterpretableModel, evaluate, use_backend
from metalens.training import TrainingConfig, loss_and_gradient, train_loop
from support import oracle
from support.metal_emulation import M1, M3, emulated, needs_clang

pytestmark = needs_clang


@pytest.fixture(scope="module", params=["llama", "gemma2", "cohere"])
def model(request, make_quantized):
    """Give tiny 4-bit models whose heads are linear, softcapped, and scaled behind a LayerNorm."""
    return InterpretableModel(make_quantized(request.param))


@pytest.fixture(scope="module")
def make_quantized(make_llama):
    def make(name):
        if name == "llama":
            return make_llama(hidden=64, vocab=131)
        shared = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "vocab_size": 131}
        shared |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        mx.random.seed(1)
        if name == "gemma2":
            made = gemma2.Model(gemma2.ModelArgs(model_type="gemma2", head_dim=16, rms_norm_eps=1e-6, final_logit_softcapping=3.0, **shared))
        else:
            made = cohere.Model(cohere.ModelArgs(model_type="cohere", logit_scale=0.25, **shared))
        # Larger than usual initial values, so that layers differ and predictions are not flat.
        made.update(tree_map(lambda p: p * 2 if p.ndim == 2 else p, made.parameters()))
        nn.quantize(made, group_size=32, bits=4)
        made.eval()
        return made

    return make


@pytest.fixture(scope="module")
def ids():
    return mx.array(np.random.default_rng(5).integers(0, 131, 60))


def flat(tree):
    return dict(tree_flatten(tree))


def test_loss_and_gradient(rng, model, ids):
    lens = oracle.random_lens(rng, 3, 64)
    stream = model.source.capture(ids[None, :24])
    with use_backend("reference"):
        losses, gradient = loss_and_gradient(lens, stream, model.unembed)
    with emulated(), mslcpu.recording() as reports:
        found, found_gradient = loss_and_gradient(lens, stream, model.unembed)
    assert {part for r in reports for part in PARTS if part in r.name} == set(PARTS) - (set() if has_norm(model) else {"norm_grad"})
    np.testing.assert_allclose(oracle.wide(found), oracle.wide(losses), rtol=1e-5, atol=1e-6)
    for name, expected in flat(gradient).items():
        np.testing.assert_allclose(oracle.wide(flat(found_gradient)[name]), oracle.wide(expected), atol=2e-6, rtol=1e-4)


PARTS = ("lens_stats", "lens_softmax_grad", "lens_backward", "norm_grad", "linear")


@pytest.mark.parametrize("device", [M1, M3], ids=["M1", "M3"])
def test_training_and_reading(model, ids, device):
    config = TrainingConfig(num_steps=3, max_seq_len=20, learning_rate=0.3)
    losses: dict[str, list[float]] = {"metal": [], "reference": []}

    def trained(name):
        return train_loop(model.source, model.unembed, ids, config, callbacks=[lambda p: losses[name].append(p.loss)])

    with use_backend("reference"):
        expected = trained("reference")
        readings = [model.read(ids[:9], lens, 4) for lens in (expected, None)]
        evaluation = evaluate(model, ids, expected, max_seq_len=30).to_dict()
    with emulated(device), mslcpu.recording() as reports:
        lens = trained("metal")
        found = [model.read(ids[:9], lens, 4), model.read(ids[:9], None, 4)]
        found_evaluation = evaluate(model, ids, lens, max_seq_len=30).to_dict()
    assert {part for r in reports for part in PARTS if part in r.name} == set(PARTS) - (set() if has_norm(model) else {"norm_grad"})
    np.testing.assert_allclose(losses["metal"], losses["reference"], rtol=2e-5)
    for ours, theirs in zip(flat(lens.parameters()).values(), flat(expected.parameters()).values(), strict=True):
        np.testing.assert_allclose(oracle.wide(ours), oracle.wide(theirs), atol=2e-5)
    for ours, theirs in zip(found, readings, strict=True):
        np.testing.assert_allclose(oracle.wide(ours.stats.entropy), oracle.wide(theirs.stats.entropy), atol=1e-5)
        np.testing.assert_array_equal(np.array(ours.stats.top_ids), np.array(theirs.stats.top_ids))
        assert ours.model_tokens == theirs.model_tokens
    for ours, theirs in zip(numbers(found_evaluation), numbers(evaluation), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert len(numbers(evaluation)) > 3 * 3  # KL, cross-entropy, agreement, ... of three layers


def test_a_trajectory_with_chosen_tokens_and_comparisons(rng, model, ids):
    lens = oracle.random_lens(rng, 3, 64)

    def read():
        found = model.trajectory(ids[:7], lens, top_k=3, tokens=[5, 9, 130])
        comparisons = [found.compare(model.trajectory(ids[:7])), found.compare_layers()]
        return found.to_json(), [getattr(c, name) for c in comparisons for name in ("kl", "reverse_kl", "js", "tv")]

    with use_backend("reference"):
        expected, expected_values = read()
    with emulated(), mslcpu.recording() as reports:
        found, values = read()
    names = " ".join(r.name for r in reports)
    assert all(part in names for part in ("lens_stats", "label_logits", "lens_compare"))
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=1e-4, atol=1e-5)
    assert len(numbers(found)) > 3 * 7 * 3
    for ours, theirs in zip(values, expected_values, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def numbers(tree):
    """Return all numbers in nested dictionaries and lists, in order."""
    if isinstance(tree, (dict, list)):
        return [n for part in (tree.values() if isinstance(tree, dict) else tree) for n in numbers(part)]
    return [tree] if isinstance(tree, (int, float)) else []


def has_norm(model):
    return model.unembed.norm.kind is not None
