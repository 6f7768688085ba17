"""lens_kl, lens_target and lens_stats of a head with an offset, and the estimator of sampled rows that it is for."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from metalens.ops import Head, Weight, lens_kl, lens_stats, lens_target, use_precision
from metalens.ops.weight import KERNEL_FORMATS
from support import oracle

V, D, L, N = 131, 128, 3, 5
ABSOLUTE = 1e-5  # for rows about one nat apart, as in test_kl.py

FORMATS = [("dense", 0, 0)] + [
    (mode, bits, group_size) for mode, (widths, sizes) in KERNEL_FORMATS.items() for bits in widths for group_size in sizes
]
# A head whose differences take the linear form, and one whose slopes differ from logit to logit.
TRANSFORMS = {"linear": {"bias": True, "scale": 0.5}, "softcap": {"bias": True, "scale": 2.0, "softcap": 6.0}}


def make_rows(rng, tokens=N, distance=0.3):
    n_model = oracle.random_array(rng, tokens, D)
    return n_model[None] + oracle.random_array(rng, L, tokens, D, scale=distance), n_model


def make_offset(rng, vocab=V):
    return oracle.random_array(rng, vocab, scale=3)


def kl_to_model(n, n_model, head):
    return lens_kl(n, lens_target(n_model, head), head)


def assert_expected(n, n_model, head):
    for ours, expected in zip(kl_to_model(n, n_model, head), oracle.lens_kl(n, n_model, head), strict=True):
        np.testing.assert_allclose(oracle.wide(ours), expected, atol=ABSOLUTE, rtol=ABSOLUTE)


def results(n, n_model, head, labels=None):
    """Return all results of the three operations by name."""
    target = lens_target(n_model, head)
    kl, gradient = lens_kl(n, target, head)
    stats = {f"stats {k}": v for k, v in vars(lens_stats(n, head, 5, n_model, labels)).items() if v is not None}
    of_target = {"target lse": target.lse, "target entropy": target.entropy} | ({} if target.mean is None else {"mean": target.mean})
    return {"kl": kl, "gradient": gradient} | of_target | stats


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f[0]}{f[1]}g{f[2]}")
def test_every_format(rng, cpu_backend, form, dtype, transform):
    mode, bits, group_size = form
    values = oracle.random_array(rng, V, D, dtype=dtype, scale=0.2)
    if mode == "dense":
        weight = Weight(values)
    elif mode == "affine":
        weight = oracle.random_weight(rng, V, D, bits, group_size, dtype, scale=0.2)
    else:
        weight = Weight(*mx.quantize(values, mode=mode), None, group_size, bits, mode)
    settings = {name: value for name, value in transform.items() if name != "bias"}
    head = Head(weight, oracle.random_array(rng, V, dtype=dtype), **settings, offset=make_offset(rng).astype(dtype))
    assert_expected(*make_rows(rng), head)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("vocab", [1, 2, 255, 257, 1003])
def test_vocabularies_around_a_block(rng, each_backend, vocab, transform):
    assert_expected(*make_rows(rng), oracle.make_head(rng, vocab, D, **transform, offset=3.0))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_operands_of_16_bits(rng, native, transform):
    n, n_model = make_rows(rng, 48)
    head = oracle.make_head(rng, 1003, D, quantized=False, **transform, offset=3.0)

    def errors(head):
        expected, slope = oracle.lens_kl(n, n_model, head)
        with use_precision("bfloat16"):
            kl, gradient = kl_to_model(n, n_model, head)
        return np.median(np.abs(oracle.wide(kl) - expected) / expected), np.linalg.norm(oracle.wide(gradient) - slope) / np.linalg.norm(slope)

    # Twice the median of test_precision.py: the offset gives weight to fewer tokens, so that fewer roundings of differences cancel. The same offset
    # as a bias of a linear head has the same error.
    assert (np.array(errors(head)) < (2e-3, 5e-3)).all()
    if head.softcap is None:
        as_bias = replace(head, bias=head.bias + head.offset / head.scale, offset=None)
        # A CPU without bfloat16 instructions takes float32 operands, whose errors are of float32's size.
        np.testing.assert_allclose(errors(head), errors(as_bias), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_an_offset_of_minus_infinity_rules_a_token_out(rng, each_backend, transform):
    head, (n, n_model) = oracle.make_head(rng, V, D, **transform, offset=3.0), make_rows(rng)
    # Among them is the most likely token of a row, and a whole vector, tile and step of the few-row kernel.
    ruled_out = np.unique([0, int(oracle.head_logits(oracle.wide(n), head)[0, 0].argmax()), *range(40, 105)])
    kept = mx.array(np.setdiff1d(np.arange(V), ruled_out))
    offset = np.array(head.offset)
    offset[ruled_out] = -np.inf
    labels = mx.array([int(kept[0].item()), int(kept[-1].item()), 0, 50, V])
    ours = results(n, n_model, replace(head, offset=mx.array(offset)), labels)
    expected = results(n, n_model, head.sampled(kept))
    for name in expected:
        theirs = oracle.wide(expected[name])
        if name == "stats top_ids":
            theirs = np.array(kept)[theirs.astype(int)]
        np.testing.assert_allclose(oracle.wide(ours[name]), theirs, atol=ABSOLUTE, rtol=ABSOLUTE, err_msg=name)
    # A label that is ruled out is less likely than all others.
    assert np.isposinf(oracle.wide(ours["stats nll"])[:, 2:4]).all()
    assert np.isfinite(oracle.wide(ours["stats nll"])[:, :2]).all()
    assert (np.array(ours["stats rank"])[:, 2:] == [kept.size + 1, kept.size + 1, -1]).all()


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("size", [1e4, 1e30, 3e38])
def test_a_huge_offset_leaves_one_token(rng, each_backend, size, transform):
    head, (n, n_model) = oracle.make_head(rng, V, D, **transform), make_rows(rng, distance=30.0)
    for offset in (mx.where(mx.arange(V) == 7, size, 0.0), mx.where(mx.arange(V) == 7, 0.0, -size)):
        found = results(n, n_model, replace(head, offset=offset))
        for name in ("kl", "gradient", "target entropy", "stats kl", "stats entropy"):
            np.testing.assert_allclose(oracle.wide(found[name]), 0, atol=1e-6, err_msg=name)
        assert (np.array(found["stats top_ids"])[..., 0] == 7).all()


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_offset_of_nan_or_infinity_is_seen_in_every_row(rng, each_backend, bad, transform):
    head, (n, n_model) = oracle.make_head(rng, V, D, **transform), make_rows(rng)
    for name, values in results(n, n_model, replace(head, offset=mx.where(mx.arange(V) == 7, bad, 0.0))).items():
        assert np.isnan(oracle.wide(values)).all() or name in ("stats top_ids", "stats agrees"), name


@pytest.mark.parametrize("tokens", [1, 5, 90])
@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
def test_a_sample_of_all_rows_with_offset_0_has_the_same_bits(rng, native, settings, tokens):
    settings = settings | {"offset": 0.0}
    head, (n, n_model) = oracle.make_head(rng, 1003, D, **settings), make_rows(rng, tokens)
    labels = mx.array(rng.integers(0, head.tokens, tokens))
    expected = results(n, n_model, head, labels)
    for other in (replace(head, offset=mx.zeros(1003)), head.sampled(mx.arange(head.tokens), mx.zeros(head.tokens))):
        for name, value in results(n, n_model, other, labels).items():
            assert mx.array_equal(value, expected[name]), name


def test_the_same_offset_for_all_tokens_changes_only_the_log_sum(rng, each_backend):
    head, (n, n_model) = oracle.make_head(rng, V, D, bias=True, scale=2.0, softcap=6.0), make_rows(rng)
    whole, shifted = (results(n, n_model, h) for h in (head, replace(head, offset=mx.full((V,), 2.5))))
    for name, value in whole.items():
        moved = 2.5 if name in ("target lse", "stats lse", "stats top_logits") else 0.0
        np.testing.assert_allclose(oracle.wide(shifted[name]), oracle.wide(value) + moved, atol=ABSOLUTE, err_msg=name)


# ---------------------------------------------------------------------- transforms of MLX


def test_vmap_compile_and_the_gradient_see_the_offset(rng, native):
    head, (n, n_model) = oracle.make_head(rng, V, D, bias=True, offset=3.0), make_rows(rng)
    bare, target = replace(head, offset=None), lens_target(n_model, head)
    expected, slope = oracle.lens_kl(n, n_model, head)
    of_bare = oracle.lens_kl(n, n_model, bare)[0]

    def both(n):  # two heads that differ in the offset alone, in one graph
        return lens_kl(n, target, head)[0], lens_kl(n, lens_target(n_model, bare), bare)[0]

    for found in (both(n), mx.compile(both)(n), mx.vmap(both)(n[:, None])):
        np.testing.assert_allclose(oracle.wide(found[0]).reshape(L, N), expected, atol=ABSOLUTE)
        np.testing.assert_allclose(oracle.wide(found[1]).reshape(L, N), of_bare, atol=ABSOLUTE)
    gradient = mx.grad(lambda n: mx.sum(lens_kl(n, target, head)[0]))(n)
    np.testing.assert_allclose(oracle.wide(gradient), slope, atol=ABSOLUTE)


# ---------------------------------------------------------------------- sampled rows


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
def test_the_logits_of_sampled_rows_are_those_of_the_whole_head(rng, native, settings, quantized):
    head, (n, _) = oracle.make_head(rng, 1003, D, quantized, **settings), make_rows(rng)
    ids = np.sort(rng.choice(head.tokens, 61, replace=False))
    offset = make_offset(rng, 61)
    sampled = lens_stats(n, head.sampled(mx.array(ids), offset), 61)
    whole = lens_stats(n, head, head.tokens)
    z, z_sampled = np.full((L, N, 1003), np.nan), np.full((L, N, 61), np.nan)
    np.put_along_axis(z, np.array(whole.top_ids), np.array(whole.top_logits), axis=-1)
    np.put_along_axis(z_sampled, np.array(sampled.top_ids), np.array(sampled.top_logits), axis=-1)
    np.testing.assert_allclose(z_sampled, z[..., ids] + oracle.wide(offset), atol=2e-6)


@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
def test_the_loss_of_sampled_rows(rng, each_backend, settings):
    head, (n, n_model) = oracle.make_head(rng, 1003, D, **settings), make_rows(rng)
    ids, offset = np.sort(rng.choice(head.tokens, 67, replace=False)), make_offset(rng, 67)
    sampled = head.sampled(mx.array(ids), offset)
    z, z_model = (oracle.head_logits(oracle.wide(a), head)[..., ids] + oracle.wide(offset) for a in (n, n_model))
    kl, gradient = kl_to_model(n, n_model, sampled)
    np.testing.assert_allclose(oracle.wide(kl), oracle.kl(z_model, z), atol=ABSOLUTE, rtol=ABSOLUTE)
    np.testing.assert_allclose(oracle.wide(gradient), oracle.lens_kl(n, n_model, sampled)[1], atol=ABSOLUTE, rtol=ABSOLUTE)


def inclusion(head, n_model, certain, expected):
    """Return pi [V]: 1 for the `certain` most likely ids of each token, for the others half by the mean probability and half alike."""
    p = oracle.softmax(oracle.head_logits(oracle.wide(n_model), head))
    weight = 0.5 * p.mean(0) / p.mean(0).sum() + 0.5 / p.shape[-1]
    pi = np.minimum(1, expected * weight / weight.sum())
    pi[np.unique(np.argsort(-p, axis=-1)[:, :certain])] = 1
    return pi


def draw(rng, head, pi):
    ids = np.flatnonzero(rng.random(len(pi)) < pi)
    return head.sampled(mx.array(ids), mx.array(-np.log(pi[ids]).astype(np.float32)))


SAMPLES = 1500


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_estimated_sum_is_unbiased(rng, native, transform):
    # The mean over samples of sum exp(z - log pi) is sum exp(z); its logarithm is low by half the relative variance, to second order.
    head, (_, n_model) = oracle.make_head(rng, 300, D, **transform), make_rows(rng)
    pi = inclusion(head, n_model, 4, 120)
    z = oracle.head_logits(oracle.wide(n_model), head)
    p = oracle.softmax(z)
    variance = np.sum(p**2 * (1 - pi) / pi, axis=-1)
    assert (pi == 1).sum() < 30
    assert pi.sum() < 160
    assert (variance > 1e-5).all()
    lse = np.array([oracle.wide(lens_target(n_model, draw(rng, head, pi)).lse) for _ in range(SAMPLES)])
    logarithm = lse - (z - oracle.log_softmax(z))[..., 0]
    ratio = np.exp(logarithm)
    deviation = 4.5 * np.sqrt(variance / SAMPLES)
    assert (np.abs(ratio.mean(0) - 1) < deviation).all()
    assert (np.abs(ratio.var(0) / variance - 1) < 0.25).all()
    assert (np.abs(logarithm.mean(0) + variance / 2) < deviation + variance**1.5).all()
    # Without the offset the sum is far too small: the test can fail.
    bare = oracle.wide(lens_target(n_model, replace(draw(rng, head, pi), offset=None)).lse) - (z - oracle.log_softmax(z))[..., 0]
    assert (np.abs(np.exp(bare) - 1) > deviation).any()


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_estimated_loss_and_gradient_are_near_the_true_ones(rng, native, transform):
    head, (n, n_model) = oracle.make_head(rng, 300, D, **transform), make_rows(rng)
    pi = inclusion(head, n_model, 8, 120)
    expected, slope = oracle.lens_kl(n, n_model, head)
    found = [kl_to_model(n, n_model, draw(rng, head, pi)) for _ in range(300)]
    kl, gradient = (np.mean([oracle.wide(f[i]) for f in found], axis=0) for i in range(2))
    one = oracle.wide(found[0][1])
    # Self-normalized, so biased by the order of the variance; averaging must reduce the error of one sample by far.
    assert np.abs(kl - expected).max() < 0.02 * expected.max()
    assert np.linalg.norm(gradient - slope) < 0.2 * np.linalg.norm(one - slope)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_lens_that_equals_the_model_has_no_loss_on_any_sample(rng, each_backend, transform):
    head, (_, n_model) = oracle.make_head(rng, 300, D, **transform), make_rows(rng)
    sampled = draw(rng, head, inclusion(head, n_model, 4, 60))
    kl, gradient = kl_to_model(mx.broadcast_to(n_model, (L, N, D)), n_model, sampled)
    if each_backend == "native":
        assert not np.any(oracle.wide(kl))
        assert not np.any(oracle.wide(gradient))
    np.testing.assert_allclose(oracle.wide(kl), 0, atol=1e-6)
    np.testing.assert_allclose(oracle.wide(gradient), 0, atol=1e-6)
