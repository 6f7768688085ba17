"""Muon's steps that are as long as the loss asks for, against the definition in float64."""

import mlx.core as mx
import numpy as np
import pytest

from metalens import TunedLens
from metalens.lenses.translators import parameters_of
from metalens.training import TrainingConfig, recipe
from metalens.training.input_scale import InputScale
from metalens.training.optimizer import LensOptimizer, LossMuon
from metalens.training.polar import polynomials
from support import oracle


def by_loss(scale, gradients, losses, parameters, iterations=None, **settings):
    """The parameters of one layer after some steps with these gradients and losses, products in float32."""
    config = TrainingConfig(optimizer="muon", step_size="loss", schedule="constant", ns_steps=iterations, **settings)
    made = LensOptimizer(config, {0: parameters}, {0: scale})
    made.by_layer[0].precision = "float32"
    for step, (gradient, loss) in enumerate(zip(gradients, losses, strict=True)):
        parameters = made.update(0, parameters, gradient, step, 1.0, loss)
    return parameters


def scale_of(rng, inputs, outputs):
    return InputScale(*(mx.array(np.exp(rng.standard_normal(n)).astype(np.float32)) for n in (inputs, outputs)))


def expected_by_loss(scale, gradients, losses, start, rate, momentum):
    """The rule in float64, with singular values in place of products."""
    s, r = np.sqrt(oracle.wide(scale.inputs)), oracle.wide(scale.outputs)[:, None]
    weight, bias = (oracle.wide(start[name]) for name in ("weight", "bias"))
    v, vb = np.zeros_like(weight), np.zeros_like(bias)
    for step, (gradient, loss) in enumerate(zip(gradients, losses, strict=True)):
        g, gb = (oracle.wide(gradient[name]) for name in ("weight", "bias"))
        v, vb = momentum * v + (1 - momentum) * g, momentum * vb + (1 - momentum) * gb
        m, mb = (1 - momentum) * g + momentum * v, (1 - momentum) * gb + momentum * vb
        left, values, right = np.linalg.svd(r * m / s)
        values = values / (1.01 * np.linalg.norm(values))
        for a, b, c in polynomials(len(weight), 6)[0]:
            values = a * values + b * values**3 + c * values**5
        direction = r * ((left * values) @ right) / s
        slope = max(np.sum(g * direction), LossMuon.LEAST * np.sum(m * direction) / (1 - momentum ** (step + 2)))
        weight = weight - rate * loss / slope * direction
        bias = bias - LossMuon.BIAS * rate * r[:, 0] * (r[:, 0] * mb) / np.linalg.norm(r[:, 0] * mb)
    return weight, bias


def test_without_a_loss_only_the_momentum_moves(rng):
    """The step after it is the one that a step without a length leaves."""
    size = 8
    start = {"weight": mx.eye(size) + oracle.random_array(rng, size, size), "bias": oracle.random_array(rng, size)}
    gradients = [{"weight": oracle.random_array(rng, size, size), "bias": oracle.random_array(rng, size)} for _ in range(3)]
    scale = scale_of(rng, size, size)
    settings = {"learning_rate": 0.1, "momentum": 0.7}
    one = by_loss(scale, gradients[:1], [1.0], start, 6, **settings)
    two = by_loss(scale, gradients[:2], [1.0, 0.0], start, 6, **settings)
    assert all(mx.array_equal(two[name], one[name]) for name in start)
    found = by_loss(scale, gradients, [1.0, 0.0, 1.5], start, 6, **settings)
    weight, _ = expected_by_loss(scale, gradients, [1.0, 0.0, 1.5], start, 0.1, 0.7)
    np.testing.assert_allclose(oracle.wide(found["weight"]), weight, atol=2e-3 * np.abs(weight - oracle.wide(start["weight"])).max())


@pytest.mark.usefixtures("cpu_backend")
def test_a_step_takes_its_part_off_the_loss(rng):
    size = 13
    start = {"weight": mx.eye(size) + oracle.random_array(rng, size, size), "bias": oracle.random_array(rng, size)}
    gradients = [{"weight": oracle.random_array(rng, size, size, scale=1e-3), "bias": oracle.random_array(rng, size)} for _ in range(4)]
    gradients[3]["weight"] = -gradients[2]["weight"]  # against the momentum: LEAST bounds the step
    scale, losses = scale_of(rng, size, size), [2.0, 1.5, 1.0, 1.0]
    found = by_loss(scale, gradients, losses, start, 6, learning_rate=0.1, momentum=0.7)
    weight, bias = expected_by_loss(scale, gradients, losses, start, 0.1, 0.7)
    np.testing.assert_allclose(oracle.wide(found["weight"]), weight, atol=2e-3 * np.abs(weight - oracle.wide(start["weight"])).max())
    np.testing.assert_allclose(oracle.wide(found["bias"]), bias, atol=1e-4)


@pytest.mark.parametrize("variant", [{}, {"rank": 3}, {"bias_only": True}], ids=["full", "low-rank", "bias"])
def test_the_unit_of_an_output_changes_nothing(rng, variant):
    """With dimensions of the lens's output multiplied by c, the update of their rows is."""
    size, c = 9, np.exp2(rng.integers(-6, 7, 9)).astype(np.float32)
    factors = {"weight": c[:, None], "bias": c, "down": np.float32(1), "up": c[:, None]}
    start = {name: oracle.random_array(rng, *p.shape) for name, p in parameters_of(TunedLens(1, size, **variant).translators[0]).items()}
    gradients = [{name: oracle.random_array(rng, *p.shape) for name, p in start.items()} for _ in range(3)]
    scale, losses = scale_of(rng, size, size), [1.0, 2.0, 3.0]
    found = by_loss(scale, gradients, losses, start, **variant)
    other = by_loss(
        InputScale(scale.inputs, scale.outputs * mx.array(c)),
        [{name: g / mx.array(factors[name]) for name, g in each.items()} for each in gradients],
        losses,
        {name: p * mx.array(factors[name]) for name, p in start.items()},
        **variant,
    )
    for name, p in found.items():
        np.testing.assert_allclose(oracle.wide(other[name]) / factors[name], oracle.wide(p), rtol=1e-4, atol=1e-4)
        assert np.abs(oracle.wide(p) - oracle.wide(start[name])).max() > 1e-2


def test_an_older_checkpoint_has_one_scale_of_the_last_hidden_states(rng):
    """It goes on as it began: all dimensions alike."""
    start = {"weight": mx.eye(9), "bias": mx.zeros((9,))}
    gradients = [{name: oracle.random_array(rng, *p.shape) for name, p in start.items()}]
    inputs = scale_of(rng, 9, 9).inputs
    older = by_loss(InputScale(inputs, mx.array(3.0)), gradients, [1.0], start)
    alike = by_loss(InputScale(inputs, mx.full((9,), 3.0)), gradients, [1.0], start)
    for name in start:
        np.testing.assert_allclose(oracle.wide(older[name]), oracle.wide(alike[name]), atol=1e-6)


def test_no_loss_is_no_step(rng):
    start = {"weight": mx.eye(9), "bias": mx.zeros((9,))}
    gradients = [{name: oracle.random_array(rng, *p.shape) for name, p in start.items()}]
    found = by_loss(scale_of(rng, 9, 9), gradients, [0.0], start)
    assert all(mx.array_equal(found[name], p) for name, p in start.items())


def losses_with_huge_dimensions(rng, config, size=32):
    """The loss of a layer before each step and after the last. Two dimensions are 300 times as large as the others, as in Gemma 3's residual stream.

    The loss is half the squared error of W h + b in the units of the outputs. The start is near the best W, as a warm start is.
    """
    inputs, outputs = np.ones(size), np.full(size, 10.0)
    inputs[:2], outputs[:2] = 300.0, 300.0
    h = rng.standard_normal((512, size)) * inputs
    best = outputs[:, None] * np.linalg.qr(rng.standard_normal((size, size)))[0] / inputs
    start = best + 0.05 * outputs[:, None] * rng.standard_normal((size, size)) / inputs
    parameters = {"weight": mx.array(start.astype(np.float32)), "bias": mx.zeros((size,))}
    scale = InputScale(*(mx.array(rms.astype(np.float32)) for rms in (inputs, outputs)))
    optimizer, losses = LensOptimizer(config, {0: parameters}, {0: scale}), []
    for step in range(config.num_steps + 1):
        weight, bias = (oracle.wide(parameters[name]) for name in ("weight", "bias"))
        error = (h @ (weight - best).T + bias) / outputs
        losses.append(0.5 * np.mean(np.sum(error**2, axis=1)))
        rows = error / outputs / len(h)
        gradient = {"weight": mx.array((rows.T @ h).astype(np.float32)), "bias": mx.array(rows.sum(axis=0).astype(np.float32))}
        if step < config.num_steps:
            parameters = optimizer.update(0, parameters, gradient, step, 1.0, losses[-1])
    return losses


def test_the_default_recipe_does_not_diverge_where_a_few_dimensions_are_huge():
    """Its steps of fixed length, as they were, make the loss thousands of times as large, as on Gemma 3."""
    short = {"num_steps": 8, "guard_tokens": 0}
    before = {"step_size": "rate", "learning_rate": 0.025, "layer_rates": "distance"}
    losses = losses_with_huge_dimensions(np.random.default_rng(0), recipe("fast", **short))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]
    assert losses_with_huge_dimensions(np.random.default_rng(0), recipe("fast", **short, **before))[1] > 1000 * losses[0]
