"""Low-rank and bias-only lenses, and lenses of some layers: what they compute, their gradients, and their files."""

import copy

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from metalens import InterpretableModel, TunedLens
from metalens.lenses.translators import dense, parameters_of, translate
from metalens.models.layers import EMBEDDING
from metalens.ops import Norm, normed
from support.lenses import FORMS, each_form, flat, randomized
from support.mocks import DIM, LAYERS, MockModel


def in_float64(parameters, h):
    """The translator, independently."""
    p = {name: np.array(array).astype(np.float64) for name, array in parameters.items()}
    if "weight" in p:
        return h @ p["weight"].T + p["bias"]
    if "down" in p:
        h = h + h @ p["down"].T @ p["up"].T
    return h + p.get("bias", 0)


# ---------------------------------------------------------------- what they compute


@each_form
def test_a_new_lens_of_any_form_is_the_identity(form):
    lens = TunedLens(3, 5, **form)
    h = mx.array(np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32))
    for layer in range(3):
        np.testing.assert_array_equal(np.array(lens(h, layer)), np.array(h))
        weight, bias = lens.dense(layer)
        np.testing.assert_array_equal(np.array(weight), np.eye(5, dtype=np.float32))
        np.testing.assert_array_equal(np.array(bias), np.zeros(5, dtype=np.float32))


@each_form
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (0, 5)])
@pytest.mark.usefixtures("cpu_backend")
def test_the_affine_map(form, dtype, shape):
    lens = randomized(form)
    h = mx.array(np.random.default_rng(1).normal(size=shape).astype(np.float32)).astype(dtype)
    wide = np.array(h.astype(mx.float32)).astype(np.float64)
    for layer in range(3):
        found, translator = lens(h, layer), lens.translator(layer, 5)
        assert found.dtype == mx.float32
        expected = in_float64(parameters_of(translator), wide)
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.array(translator(h.astype(mx.float32))), expected, rtol=1e-5, atol=1e-5)
        for weight, bias in (lens.dense(layer), (translator.weight, translator.bias)):
            assert (weight.shape, bias.shape, weight.dtype, bias.dtype) == ((5, 5), (5,), mx.float32, mx.float32)
            np.testing.assert_allclose(wide @ np.array(weight).T + np.array(bias), expected, rtol=1e-5, atol=1e-5)


def test_a_translator_without_its_bias():
    h = mx.array(np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32))
    for form in FORMS.values():
        parameters = parameters_of(randomized(form).translators[1])
        bias = parameters.pop("bias", mx.zeros(5))
        whole = translate({**parameters, "bias": bias}, h)
        np.testing.assert_allclose(np.array(translate(parameters, h) + bias), np.array(whole), rtol=1e-6, atol=1e-6)
        for found, expected in zip(dense(parameters, 5), (dense({**parameters, "bias": bias}, 5)[0], mx.zeros(5)), strict=True):
            np.testing.assert_array_equal(np.array(found), np.array(expected))


def test_low_rank_lenses_start_from_random_seeded_directions():
    a, b, c = (np.array(TunedLens(2, 64, rank=8, seed=seed).translators[1].down) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1
    assert np.abs(a - np.array(TunedLens(2, 64, rank=8).translators[0].down)).max() > 0.1
    assert 0.8 / 8 < a.std() < 1.2 / 8
    assert not np.array(TunedLens(2, 64, rank=8).translators[0].up).any()


@pytest.mark.parametrize(
    "form", [{"rank": 0}, {"rank": -1}, {"rank": 6}, {"rank": 2, "bias_only": True}, {"layers": [3]}, {"layers": [-1]}, {"rank": 2, "layers": [0, 9]}]
)
def test_forms_that_do_not_exist(form):
    with pytest.raises(ValueError, match=r"rank must be from 1 to 5|layers must be from 0 to 2"):
        TunedLens(3, 5, **form)


def test_layers_may_come_in_any_order_and_twice():
    assert TunedLens(4, 3, layers=iter([2, 0, 2])).layers == [0, 2]
    assert TunedLens(4, 3).layers == [0, 1, 2, 3]


@each_form
def test_layers_and_widths_that_a_lens_does_not_have(form):
    lens = TunedLens(3, 5, **form)
    for call in (lambda i: lens(mx.zeros(5), i), lens.dense, lambda i: lens.translator(i, 5)):
        with pytest.raises(ValueError, match="layer_idx 3 out of range"):
            call(3)
    with pytest.raises(ValueError, match="vectors of width 5"):
        lens(mx.zeros((2, 4)), 1)


def test_the_parameters_of_each_form():
    def names(**form):
        return sorted(name for name, _ in tree_flatten(TunedLens(2, 5, **form).parameters()))

    assert names() == ["translators.0.bias", "translators.0.weight", "translators.1.bias", "translators.1.weight"]
    assert names(rank=2, layers=[1]) == ["translators.1.bias", "translators.1.down", "translators.1.up"]
    assert names(bias_only=True) == ["translators.0.bias", "translators.1.bias"]
    assert names(layers=[]) == []
    low = TunedLens(2, 5, rank=2).translators[0]
    assert (low.down.shape, low.up.shape, low.bias.shape) == ((2, 5), (5, 2), (5,))


def test_derived_arrays_cannot_be_set():
    for lens in (TunedLens(1, 3, rank=1), TunedLens(1, 3, bias_only=True), TunedLens(1, 3, layers=[])):
        with pytest.raises(AttributeError, match="weight of a .* can only be read"):
            lens.translators[0].weight = mx.eye(3)
    with pytest.raises(AttributeError, match="bias of a .* can only be read"):
        lens.translators[0].bias = mx.zeros(3)


def test_the_provenance_is_no_parameter():
    lens = TunedLens(1, 2)
    lens.provenance = {"model": "x", "training": {"lr": 1.0}}
    assert sorted(flat(lens)) == ["translators.0.bias", "translators.0.weight"]
    assert "provenance" not in lens.state
    assert "origin" not in lens.state
    other = copy.deepcopy(lens)
    other.provenance["model"] = "y"
    assert lens.provenance["model"] == "x"


@each_form
def test_the_full_form_of_any_lens(form):
    lens = randomized(form | {"embedding": True})
    lens.provenance = {"model": "x"}
    full = lens.to_full()
    assert (full.rank, full.bias_only, full.layers) == (None, False, [0, 1, 2])
    assert all(type(translator) is nn.Linear for translator in full.translators)
    assert full.provenance == lens.provenance
    assert type(full.embedding_translator) is nn.Linear
    h = mx.array(np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32))
    for layer in (EMBEDDING, 0, 1, 2):
        np.testing.assert_allclose(np.array(full(h, layer)), np.array(lens(h, layer)), rtol=1e-5, atol=1e-5)
    full.provenance["model"] = "y"
    assert lens.provenance == {"model": "x"}


# ---------------------------------------------------------------- gradients


@each_form
@pytest.mark.usefixtures("cpu_backend")
def test_the_gradient_of_translate(form):
    lens = randomized(form)
    rng = np.random.default_rng(2)
    h, c = (rng.normal(size=(7, 5)).astype(np.float32) for _ in range(2))
    for layer in range(3):
        parameters = parameters_of(lens.translators[layer])
        names = sorted(parameters)
        p = {name: np.array(array).astype(np.float64) for name, array in parameters.items()}

        def rows(x, *arrays, names=names):
            return translate(dict(zip(names, arrays, strict=True)), x)

        (y,), (dh, *found) = mx.vjp(rows, [mx.array(h), *(parameters[name] for name in names)], [mx.array(c)])
        np.testing.assert_allclose(np.array(y), in_float64(parameters, h.astype(np.float64)), rtol=1e-5, atol=1e-5)
        expected = {"bias": c.sum(0), "weight": c.T @ h}
        if "down" in p:
            expected |= {"up": c.T @ (h @ p["down"].T), "down": (c @ p["up"]).T @ h}
        for name, gradient in zip(names, found, strict=True):
            np.testing.assert_allclose(np.array(gradient), expected[name], rtol=1e-4, atol=1e-4)
        weight, _ = dense(parameters, 5)
        np.testing.assert_allclose(np.array(dh), c @ np.array(weight).astype(np.float64), rtol=1e-4, atol=1e-4)


@each_form
@pytest.mark.usefixtures("cpu_backend")
def test_the_gradient_through_the_norm(form):
    """normed(translate(p, h)) is what a trainer of the variants differentiates; central differences of it in float64."""
    lens = randomized(form)
    rng = np.random.default_rng(3)
    h, c = (rng.normal(size=(4, 5)) for _ in range(2))
    gain = rng.normal(size=5)
    module = nn.RMSNorm(5)
    module.weight = mx.array(gain.astype(np.float32))
    norm = Norm(module, "rms", module.weight, None, module.eps)

    def objective(p):
        y = in_float64(p, h)
        return float((c * y / np.sqrt((y * y).mean(-1, keepdims=True) + module.eps) * gain).sum())

    for layer in lens.layers:
        parameters = parameters_of(lens.translators[layer])
        names = sorted(parameters)

        def rows(*arrays, names=names):
            return normed(translate(dict(zip(names, arrays, strict=True)), mx.array(h.astype(np.float32))), norm)

        _, found = mx.vjp(rows, [parameters[name] for name in names], [mx.array(c.astype(np.float32))])
        for name, gradient in zip(names, found, strict=True):
            values = np.array(parameters[name]).astype(np.float64)
            expected = np.zeros_like(values)
            for index in np.ndindex(values.shape):
                sides = []
                for step in (1e-5, -1e-5):
                    moved = values.copy()
                    moved[index] += step
                    sides.append(objective({**{k: np.array(v).astype(np.float64) for k, v in parameters.items()}, name: moved}))
                expected[index] = (sides[0] - sides[1]) / 2e-5
            np.testing.assert_allclose(np.array(gradient), expected, rtol=2e-3, atol=2e-4)


@each_form
def test_an_optimizer_takes_any_form(form):
    """Gradients come in the tree of parameters(), with {} for the layers that are left alone."""
    lens = randomized(form)
    before = flat(lens)
    optimizer = optim.SGD(learning_rate=0.5, momentum=0.9)
    for _ in range(2):
        optimizer.update(lens, tree_map(mx.ones_like, lens.parameters()))
        mx.eval(lens.state, optimizer.state)
    for name, array in flat(lens).items():
        np.testing.assert_allclose(array, before[name] - 0.5 - 0.5 * 1.9, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- with a model


@pytest.mark.parametrize("form", [{"rank": 3}, {"bias_only": True}, {"layers": [1]}], ids=str)
def test_a_model_reads_through_every_form(form):
    model = InterpretableModel(MockModel())
    lens = TunedLens(LAYERS, DIM, **form)
    lens.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape, key=mx.random.key(p.size)), lens.parameters()))
    found, expected = (model.read([1, 2, 3], each, top_k=4) for each in (lens, lens.to_full()))
    np.testing.assert_allclose(np.array(found.stats.top_logits), np.array(expected.stats.top_logits), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.array(found.stats.top_ids), np.array(expected.stats.top_ids))
    np.testing.assert_allclose(np.array(found.stats.entropy), np.array(expected.stats.entropy), rtol=1e-4, atol=1e-4)
