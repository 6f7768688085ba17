"""Updates, one layer at a time: stochastic rounding, 16-bit state, decay toward the identity, Muon's orthogonal steps, rates of layers."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from metalens import TunedLens
from metalens.lenses.translators import parameters_of
from metalens.training import TrainingConfig, train_loop
from metalens.training.optimizer import LensMuon, LensOptimizer, gradient_norm, stochastically_rounded
from metalens.training.polar import polynomials
from support import oracle

LENGTH = 16


def rounded(values, seed=0):
    return stochastically_rounded(mx.array(np.asarray(values, np.float32)), mx.random.key(seed))


def as_numpy(a):
    return np.array(a.astype(mx.float32))


# Stochastic rounding


@pytest.mark.parametrize("value", [1.001, -1.001, 0.3, 3.0e-5, -7.7e20, 1e-39], ids=str)
def test_rounding_is_to_the_neighbours_and_right_on_average(value):
    value = float(np.float32(value))
    found = as_numpy(rounded(np.full(40_000, value)))
    below = np.array([value], np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    neighbors = np.concatenate([below, below + np.uint32(0x10000)]).view(np.float32)
    assert set(np.unique(found)) == set(neighbors)
    step = abs(float(neighbors[1]) - float(neighbors[0]))
    share = abs(value - float(neighbors[0])) / step
    assert np.mean(found == neighbors[1]) == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / found.size))


def test_what_bfloat16_holds_stays(rng):
    exact = mx.array(rng.standard_normal(1000)).astype(mx.bfloat16)
    values = as_numpy(exact)
    for seed in range(5):
        assert mx.array_equal(rounded(values, seed), exact)
    zeros = rounded([0.0, -0.0, 1.0, -2.0, 2.0**-126])
    assert zeros.tolist() == [0.0, 0.0, 1.0, -2.0, 2.0**-126]
    assert np.signbit(as_numpy(zeros)).tolist() == [False, True, False, True, False]


def test_what_is_not_finite_stays():
    nan = np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], np.uint32).view(np.float32)
    for seed in range(20):
        assert np.isnan(as_numpy(rounded(nan, seed))).all()
        assert rounded([np.inf, -np.inf], seed).tolist() == [np.inf, -np.inf]


def test_the_largest_numbers_are_not_nan():
    largest = np.finfo(np.float32).max
    found = as_numpy(rounded(np.tile([largest, -largest], 100)))
    assert not np.isnan(found).any()
    assert (np.sign(found) == np.tile([1, -1], 100)).all()


def test_rounding_is_determined_by_the_key(rng):
    values = rng.standard_normal((30, 40))
    first, again, other = (as_numpy(rounded(values, seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert 0.1 < np.mean(first != other) < 0.6
    assert rounded(values).shape == (30, 40)
    assert rounded(values).dtype == mx.bfloat16


def test_small_updates_are_not_lost(rng):
    """A thousand steps of 1e-5 from 1: rounding to nearest would stay at 1, whose neighbors are 0.004 and 0.008 away."""
    config = TrainingConfig(num_steps=1000, schedule="constant", learning_rate=1e-5, momentum=0.0, dtype="bfloat16")
    parameters = {"bias": mx.ones((2000,), mx.bfloat16)}
    optimizer = LensOptimizer(config, {0: parameters})
    for step in range(1000):
        parameters = optimizer.update(0, parameters, {"bias": mx.ones((2000,))}, step, 1.0)
    assert parameters["bias"].dtype == mx.bfloat16
    assert as_numpy(parameters["bias"]).mean() == pytest.approx(0.99, abs=5e-4)


# 16-bit state


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
@pytest.mark.parametrize("variant", [{}, {"rank": 4}, {"bias_only": True}], ids=["full", "low-rank", "bias"])
def test_bfloat16_halves_the_memory(optimizer, variant):
    bytes_of = {}
    for dtype in ("float32", "bfloat16"):
        config = TrainingConfig(optimizer=optimizer, dtype=dtype, **variant)
        parameters = {0: {name: p.astype(getattr(mx, dtype)) for name, p in parameters_of(TunedLens(1, 64, **variant).translators[0]).items()}}
        made = LensOptimizer(config, parameters)
        for step in range(2):
            found = made.update(0, parameters[0], {name: mx.ones(p.shape) for name, p in parameters[0].items()}, step, 1.0)
            assert {p.dtype for p in found.values()} == {getattr(mx, dtype)}
            assert {a.dtype for a in made.state().values() if a.ndim} == {getattr(mx, dtype)}
        bytes_of[dtype] = sum(a.nbytes for a in made.state().values() if a.ndim) + sum(p.nbytes for p in found.values())
        assert sum(a.size for a in made.state().values() if a.ndim) == (2 if optimizer == "adam" else 1) * sum(p.size for p in found.values())
    assert bytes_of["bfloat16"] * 2 == bytes_of["float32"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_bfloat16_learns_as_much(tiny, optimizer, rng):
    ids = mx.array(np.tile(rng.integers(0, 131, 8), 8))
    last = {}
    for dtype in ("float32", "bfloat16"):
        seen = []
        rate = {"sgd": 0.3, "adam": 3e-3, "muon": 0.02}[optimizer]
        settings = {"num_steps": 25, "max_seq_len": LENGTH, "optimizer": optimizer, "learning_rate": rate, "reduction": "sum", "dtype": dtype}
        lens = train_loop(tiny.source, tiny.unembed, ids, TrainingConfig(**settings), callbacks=[seen.append])
        assert {t.weight.dtype for t in lens.translators} == {mx.float32}
        last[dtype] = seen[-1].loss
        assert seen[-1].loss < 0.5 * seen[0].loss
    assert last["bfloat16"] == pytest.approx(last["float32"], rel=0.2, abs=0.02)


def test_the_gradient_of_bfloat16_parameters_is_float32(tiny, rng, monkeypatch):
    """The first step from the identity, which both types hold: a gradient that was rounded to bfloat16 would be off by 1 in 500."""
    ids, norms = mx.array(rng.integers(0, 131, LENGTH)), {}
    for dtype in ("float32", "bfloat16"):
        seen, found = [], []
        original = LensOptimizer.update

        def update(self, layer, parameters, gradient, *others, found=found, original=original):
            found.append({name: as_numpy(g) for name, g in gradient.items()})
            return original(self, layer, parameters, gradient, *others)

        with monkeypatch.context() as patch:
            patch.setattr(LensOptimizer, "update", update)
            config = TrainingConfig(num_steps=1, max_seq_len=LENGTH, dtype=dtype)
            train_loop(tiny.source, tiny.unembed, ids, config, callbacks=[seen.append])
        norms[dtype] = (seen[0].gradient_norm, found)
    assert norms["float32"][0] == norms["bfloat16"][0]
    for a, b in zip(norms["float32"][1], norms["bfloat16"][1], strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_layers_and_steps_are_rounded_independently(rng):
    config = TrainingConfig(num_steps=10, schedule="constant", learning_rate=1e-3, momentum=0.0, dtype="bfloat16")
    start = {"bias": mx.array(rng.standard_normal(500)).astype(mx.bfloat16)}

    def after(layer=0, step=0, seed=None):
        config_of_seed = TrainingConfig(**{**config.to_dict(), "seed": seed})
        return as_numpy(LensOptimizer(config_of_seed, {layer: start}).update(layer, start, {"bias": mx.ones((500,))}, step, 1.0)["bias"])

    first = after()
    assert np.array_equal(first, after())
    for other in (after(layer=1), after(step=1), after(seed=1)):
        assert 0.02 < np.mean(first != other) < 0.7


# Decay


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
@pytest.mark.parametrize("variant", [{}, {"rank": 4}, {"bias_only": True}], ids=["full", "low-rank", "bias"])
def test_decay_is_towards_the_identity(rng, optimizer, variant):
    """With no gradient the translator becomes the identity, and is left alone once it is."""
    lens = TunedLens(1, 16, **variant)
    parameters = {name: p + oracle.random_array(rng, *p.shape) for name, p in parameters_of(lens.translators[0]).items()}
    config = TrainingConfig(num_steps=30, schedule="constant", learning_rate=0.5, momentum=0.0, weight_decay=0.1, optimizer=optimizer)
    made = LensOptimizer(config, {0: parameters})
    nothing = {name: mx.zeros(p.shape) for name, p in parameters.items()}
    expected = {name: oracle.wide(p) - (np.eye(16) if name == "weight" else 0) for name, p in parameters.items()}
    for step in range(30):
        parameters = made.update(0, parameters, nothing, step, 1.0)
    for name, p in parameters.items():
        found = oracle.wide(p) - (np.eye(16) if name == "weight" else 0)
        np.testing.assert_allclose(found, expected[name] * 0.95**30, atol=1e-5)
    identity = {name: p for name, p in parameters_of(TunedLens(1, 16, **variant).translators[0]).items() if name != "down"}
    made = LensOptimizer(config, {0: identity})
    assert all(mx.array_equal(p, identity[name]) for name, p in made.update(0, identity, {n: nothing[n] for n in identity}, 0, 1.0).items())


def test_decay_is_added_after_the_clip(rng):
    weight = mx.eye(8) + oracle.random_array(rng, 8, 8)
    gradient = oracle.random_array(rng, 8, 8, scale=100.0)
    config = TrainingConfig(num_steps=1, learning_rate=0.1, momentum=0.0, weight_decay=0.5)
    made = LensOptimizer(config, {0: {"weight": weight}})
    norm = gradient_norm([{"weight": gradient}])
    found = made.update(0, {"weight": weight}, {"weight": gradient}, 0, made.clip(norm))["weight"]
    expected = oracle.wide(weight) - 0.1 * (oracle.wide(gradient) / (norm + 1e-6) + 0.5 * (oracle.wide(weight) - np.eye(8)))
    np.testing.assert_allclose(oracle.wide(found), expected, atol=1e-5)


def test_the_clip():
    made = LensOptimizer(TrainingConfig(gradient_clip=2.0), {})
    assert made.clip(4.0) == pytest.approx(0.5, rel=1e-6)
    assert (made.clip(1.0), made.clip(0.0)) == (1.0, 1.0)
    assert LensOptimizer(TrainingConfig(gradient_clip=float("inf")), {}).clip(1e9) == 1.0
    assert LensOptimizer(TrainingConfig(optimizer="muon"), {}).clip(1e9) == 1.0


# Muon


@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (7, 64), (64, 7), (1, 9), (9, 1)], ids=str)
@pytest.mark.usefixtures("cpu_backend")
def test_muon_is_mlx_s_but_for_the_orthogonal_factor(rng, shape):
    """With the singular values in float64 in its place; with two iterations they are far from 1, and differ."""

    class Exact(optim.Muon):
        def _zeropower_via_newtonschulz5(self, X, steps):
            u, s, v = np.linalg.svd(oracle.wide(X), full_matrices=False)
            s = s / (1.01 * np.linalg.norm(s))
            for a, b, c in polynomials(min(shape), 2)[0]:
                s = a * s + b * s**3 + c * s**5
            return mx.array(((u * s) @ v).astype(np.float32))

    gradients = [oracle.random_array(rng, *shape) for _ in range(3)]
    results = []
    for made in (optimizer(learning_rate=0.1, momentum=0.9, weight_decay=0.0) for optimizer in (Exact, LensMuon)):
        parameter, after = {"weight": mx.zeros(shape)}, []
        made.init(parameter)
        made.precision, made.iterations = "float32", 2
        for gradient in gradients:
            parameter = made.apply_gradients({"weight": gradient}, parameter)
            after.append(oracle.wide(parameter["weight"]))
        results.append(after)
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-3 * np.abs(a).max())


def test_the_iterations_are_the_setting(rng):
    gradient = {"weight": oracle.random_array(rng, 64, 64)}
    steps = {}
    for iterations in (None, 1, 3, 8):  # 3 is what 64 rows ask for
        parameters = {"weight": mx.eye(64)}
        made = LensOptimizer(TrainingConfig(optimizer="muon", ns_steps=iterations), {0: parameters})
        steps[iterations] = oracle.wide(made.update(0, parameters, gradient, 0, 1.0)["weight"])
    assert np.array_equal(steps[None], steps[3])
    assert len({step.tobytes() for step in steps.values()}) == 3


def test_muon_s_vectors_have_unit_length(rng):
    made = LensMuon(learning_rate=0.5, momentum=0.9, weight_decay=0.0)
    gradient = {"bias": oracle.random_array(rng, 30, scale=1e-6)}
    made.init(gradient)
    step = oracle.wide(made.apply_gradients(gradient, {"bias": mx.zeros((30,))})["bias"])
    np.testing.assert_allclose(step, -0.5 * oracle.wide(gradient["bias"]) / np.linalg.norm(oracle.wide(gradient["bias"])), atol=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_no_gradient_is_no_step(optimizer):
    parameters = {"weight": mx.eye(8), "bias": mx.zeros((8,))}
    made = LensOptimizer(TrainingConfig(num_steps=3, optimizer=optimizer, weight_decay=0.1), {0: parameters})
    for step in range(3):
        found = made.update(0, parameters, {name: mx.zeros(p.shape) for name, p in parameters.items()}, step, 1.0)
        assert all(mx.array_equal(found[name], p) for name, p in parameters.items())


# Rates of layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_a_layer_that_the_warm_start_moved_further_learns_faster(rng, optimizer, dtype):
    """In proportion to its distance: 2 is where all singular values of W - I are 2."""
    gradient = {"weight": mx.ones((8, 8)), "bias": mx.ones((8,))}
    rotation = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    start = {0: 0.0, 1: 1.0, 2: 2.0}
    parameters = {
        layer: {"weight": mx.array(np.eye(8) + d * rotation).astype(getattr(mx, dtype)), "bias": mx.zeros((8,), getattr(mx, dtype))}
        for layer, d in start.items()
    }
    steps = {}
    for rates, tokens in (("distance", 64), ("distance", 0), ("equal", 64)):
        config = TrainingConfig(optimizer=optimizer, learning_rate=0.1, layer_rates=rates, warm_start_tokens=tokens, dtype=dtype)
        made = LensOptimizer(config, parameters)
        found = {layer: made.update(layer, parameters[layer], gradient, 0, 1.0) for layer in parameters}
        steps[rates, tokens] = [np.linalg.norm(as_numpy(found[layer]["bias"])) for layer in parameters]
    expected = np.array(steps["equal", 64]) * [0, 1, 2]
    np.testing.assert_allclose(steps["distance", 64], expected, rtol=0.02 if dtype == "bfloat16" else 1e-5)
    assert steps["distance", 0] == steps["equal", 64]


def test_rates_are_those_of_the_start_also_after_it_was_left(rng):
    config = TrainingConfig(optimizer="muon", layer_rates="distance", warm_start_tokens=64)
    start, later = ({0: {"weight": mx.array(rng.standard_normal((8, 8)).astype(np.float32))}} for _ in range(2))
    made, other = LensOptimizer(config, start), LensOptimizer(config, later)
    assert made.rates[0].item() != other.rates[0].item()
    other.restore(made.state())
    assert made.rates[0].item() == other.rates[0].item()


# Its state


def test_a_state_of_another_optimizer_is_refused():
    parameters = {0: {"bias": mx.zeros((8,))}, 11: {"bias": mx.zeros((8,))}}
    sgd, adam = (LensOptimizer(TrainingConfig(optimizer=name), parameters) for name in ("sgd", "adam"))
    for state in (adam.state(), {}, LensOptimizer(TrainingConfig(), {0: parameters[0]}).state()):
        with pytest.raises(ValueError, match="of another optimizer, or of other layers"):
            sgd.restore(state)


def test_layers_whose_numbers_begin_alike_are_kept_apart():
    parameters = {layer: {"bias": mx.full((2,), float(layer))} for layer in (1, 11, 111)}
    config = TrainingConfig(num_steps=2)
    made, other = LensOptimizer(config, parameters), LensOptimizer(config, parameters)
    for layer, of_layer in parameters.items():
        made.update(layer, of_layer, {"bias": of_layer["bias"]}, 0, 1.0)
    other.restore(made.state())
    assert {layer: other.by_layer[layer].state["bias"]["v"].tolist() for layer in parameters} == {1: [1, 1], 11: [11, 11], 111: [111, 111]}
    assert other.state().keys() == made.state().keys()
