"""use_precision and METALENS_PRECISION: how they are set, and how exact 'bfloat16' still is."""

import threading

import mlx.core as mx
import numpy as np
import pytest

from metalens import _ext, use_backend, use_precision
from metalens.ops import Head, Norm, Weight, lens_compare, lens_kl, lens_stats, lens_target, linear, precision, translate_norm
from support import oracle

# Operands of 8 significant bits are off by up to 2^-9, in the mean by a third of that; a sum of many by less, relative to the size of its terms.
BF16 = 4e-3
# Errors of a KL: the median over rows, relative to the KL, and the worst row in nats.
KL_MEDIAN, KL_WORST = 1e-3, 1.5e-2
# Errors of its gradient, relative to its length: all rows as one vector, and the worst row.
GRADIENT, GRADIENT_WORST = 5e-3, 2e-2


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv("METALENS_PRECISION", raising=False)


# ---------------------------------------------------------------------- the setting


def test_float32_is_the_default():
    assert precision() == "float32"


@pytest.mark.parametrize(("value", "expected"), [("", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16"), ("bf16", "bfloat16")])
def test_the_variable(monkeypatch, value, expected):
    monkeypatch.setenv("METALENS_PRECISION", value)
    assert precision() == expected


@pytest.mark.parametrize("value", ["BFLOAT16", "BF16", " bf16", "16", "auto"])
def test_a_wrong_variable_is_named_with_the_choices(rng, native, monkeypatch, value):
    monkeypatch.setenv("METALENS_PRECISION", value)
    with pytest.raises(ValueError, match=rf"METALENS_PRECISION='{value}' is not a valid precision. Choose one of float32, bfloat16\."):
        linear(oracle.random_array(rng, 1, 128), oracle.random_weight(rng, 5, 128))


@pytest.mark.parametrize("value", ["BFLOAT16", "", None, "native"])
def test_use_precision_refuses_other_names(value):
    message = rf"use_precision\(\) got {value!r}, which is not a valid precision. Choose one of float32, bfloat16\."
    with pytest.raises(ValueError, match=message), use_precision(value):
        pass
    assert precision() == "float32"


def test_use_precision_goes_before_the_variable_and_nests_and_ends(monkeypatch):
    monkeypatch.setenv("METALENS_PRECISION", "bfloat16")
    with use_precision("float32"):
        assert precision() == "float32"
        with use_precision("bfloat16"):
            assert precision() == "bfloat16"
        assert precision() == "float32"
    with pytest.raises(KeyError), use_precision("float32"):
        raise KeyError
    assert precision() == "bfloat16"


def test_use_precision_is_this_thread_s_own():
    seen = []
    with use_precision("bfloat16"):
        thread = threading.Thread(target=lambda: seen.append(precision()))
        thread.start()
        thread.join()
    assert seen == ["float32"]


def test_the_former_name_of_bfloat16():
    with use_precision("bf16"):
        assert precision() == "bfloat16"


def test_precision_and_backend_are_chosen_apart(rng):
    x, w = oracle.random_array(rng, 3, 128), oracle.random_weight(rng, 5, 128)
    with use_backend("reference"), use_precision("bfloat16"):
        ours = linear(x, w)
    assert mx.array_equal(ours, mx.quantized_matmul(x, w.values, w.scales, w.biases, True, 32, 4))  # which ignores the precision


OPERATIONS = ("matmul", "quantized_matmul", "lens_stats", "lens_target", "lens_kl", "lens_compare", "translate_norm")


# The extension spells bfloat16 "bf16".
@pytest.mark.parametrize(("name", "spelled"), [("float32", "float32"), ("bfloat16", "bf16"), ("bf16", "bf16")])
def test_every_operation_is_told(rng, native, monkeypatch, name, spelled):
    told = {}

    def spy_on(operation, kept):
        monkeypatch.setattr(_ext, operation, lambda *args: (told.setdefault(operation, precision_in(args)), kept(*args))[1])

    def precision_in(arguments):
        (found,) = (argument for argument in arguments if isinstance(argument, str) and argument in ("float32", "bf16"))
        return found

    for operation in OPERATIONS:
        spy_on(operation, getattr(_ext, operation))
    head, n_model, norm = oracle.make_head(rng, 67, 32), oracle.random_array(rng, 3, 32), Norm(None, "rms", None, None, 1e-5)
    with use_precision(name):
        n = translate_norm(n_model[None], mx.eye(32), mx.zeros(32), norm)
        lens_stats(n, head)
        lens_kl(n, lens_target(n_model, head), head)
        lens_compare(n, n, head)
        linear(n, head.weight)
        linear(n, Weight(mx.eye(32)))
    assert told == dict.fromkeys(OPERATIONS, spelled)


# ---------------------------------------------------------------------- how exact


@pytest.fixture(params=["float32", "bfloat16"])
def each_precision(request, native):
    with use_precision(request.param):
        yield request.param


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("transpose", [True, False])
def test_products(rng, each_precision, rows, transpose):
    for w in (Weight(oracle.random_array(rng, 67, 384)), oracle.random_weight(rng, 67, 384), oracle.random_float_weight(rng, 67, 384, "mxfp4")):
        x = oracle.random_array(rng, rows, 384 if transpose else 67)
        if each_precision == "float32":
            oracle.assert_product(linear(x, w, transpose), x, w, transpose)
        else:
            oracle.assert_product_of_mlx(linear(x, w, transpose), x, w, transpose, mx.bfloat16)


@pytest.fixture
def lens_problem(rng):
    """Make the rows of lenses of several qualities, and a head whose weights bfloat16 can't hold."""
    head, n_model = oracle.make_head(rng, 2003, 128, bias=True, scale=1.0), oracle.random_array(rng, 48, 128)
    quality = mx.array([0.05, 0.2, 0.5, 1.0])[:, None, None]
    head = Head(Weight(oracle.random_array(rng, 2003, 128, scale=0.15)), head.bias)
    return n_model + quality * oracle.random_array(rng, 4, 48, 128), n_model, head


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_kl_and_gradient(each_precision, lens_problem, softcap):
    n, n_model, head = lens_problem
    head = Head(head.weight, head.bias, softcap=softcap)
    expected, slope = oracle.lens_kl(n, n_model, head)
    kl, gradient = lens_kl(n, lens_target(n_model, head), head)
    error = np.abs(oracle.wide(kl) - expected)
    assert np.median(error / expected) < KL_MEDIAN
    assert error.max() < KL_WORST
    assert np.linalg.norm(oracle.wide(gradient) - slope) < GRADIENT * np.linalg.norm(slope)
    assert oracle.row_errors(gradient, slope).max() < GRADIENT_WORST


def test_statistics(rng, each_precision, lens_problem):
    n, n_model, head = lens_problem
    labels = mx.array(rng.integers(0, 2003, 48))
    stats = lens_stats(n, head, 3, n_model, labels)
    z, z_model = (oracle.head_logits(oracle.wide(a), head) for a in (n, n_model))
    log_q = oracle.log_softmax(z)
    # A logit is off by as much as a product; a sum over the vocabulary by less.
    logit = 3 * BF16 * np.linalg.norm(oracle.wide(n), axis=-1).max() * 0.15
    np.testing.assert_allclose(oracle.wide(stats.lse), (z - log_q)[..., 0], atol=logit)
    np.testing.assert_allclose(oracle.wide(stats.entropy), oracle.entropy(z), atol=logit)
    np.testing.assert_allclose(oracle.wide(stats.top_logits), -np.sort(-z, axis=-1)[..., :3], atol=2 * logit)
    np.testing.assert_allclose(oracle.wide(stats.nll), -np.take_along_axis(log_q, np.array(labels)[None, :, None], -1)[..., 0], atol=2 * logit)
    np.testing.assert_allclose(oracle.wide(stats.kl), oracle.kl(z_model, z), atol=2 * logit)


def test_the_model_against_itself_is_still_zero(each_precision, lens_problem):
    _, n_model, head = lens_problem
    kl, gradient = lens_kl(mx.stack([n_model, n_model]), lens_target(n_model, head), head)
    assert not np.any(oracle.wide(kl))
    assert not np.any(oracle.wide(gradient))


def test_translate_norm(rng, each_precision):
    h, w, b = oracle.random_array(rng, 70, 64), oracle.random_array(rng, 64, 64, scale=0.125), oracle.random_array(rng, 64)
    n = translate_norm(h, w, b, Norm(None, "rms", None, None, 1e-5))
    expected = oracle.rms_norm(oracle.wide(h) @ oracle.wide(w).T + oracle.wide(b), 1.0, 1e-5)
    tolerance = 2e-5 if each_precision == "float32" else 5 * BF16
    np.testing.assert_allclose(oracle.wide(n), expected, atol=tolerance)
