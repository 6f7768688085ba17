"""What a user of mlxterp meets beside its lenses: activations, interventions, and names that are not here."""

import mlx.core as mx
import numpy as np
import pytest

import metalens
from support.mocks import DIM, LAYERS

TEXT = "w3 w1 w4 w1 w5"


def test_interventions_by_mlxterp_s_names(mlxterp, model):
    iv = mlxterp.interventions
    assert (iv.scale, iv.compose) == (mlxterp.scale, mlxterp.InterventionComposer)
    with model.trace(TEXT):
        plain, attention = model.output.save(), model.layers[1].up.output.save()
    assert attention.shape == (1, 5, 2 * DIM)
    with model.trace(TEXT, interventions={"layers.1": iv.compose().add(iv.scale(0.5)).add(iv.clamp(-1, 1)).build()}):
        assert mx.max(mx.abs(model.layers[1].output.save())).item() <= 1
        assert not mx.array_equal(model.output.save(), plain)


@pytest.mark.parametrize("positions", [-1, 0, [0, -2]])
def test_activations(mlxterp, model, positions):
    """Of prompts of unequal length: every position counts in its own prompt."""
    prompts = ["w3 w1 w4", "w5 w9 w2 w6 w5"]
    found = mlxterp.get_activations(model, prompts, layers=[2, 0], positions=positions)
    assert list(found) == ["layer_2", "layer_0"]
    for row, prompt in enumerate(prompts):
        hidden = model.capture(prompt).hidden
        for i in (0, 2):
            expected = np.array(hidden[i][0])[positions]
            np.testing.assert_allclose(np.array(found[f"layer_{i}"][row]), expected, rtol=1e-5, atol=1e-5)
    many = mlxterp.batch_get_activations(model, prompts * 3, [2], positions, batch_size=4)
    np.testing.assert_allclose(np.array(many["layer_2"][2:4]), np.array(found["layer_2"]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"Position 3 is out of bounds for a prompt of 3 tokens"):
        mlxterp.get_activations(model, prompts, positions=3)


def test_a_cache_of_activations(mlxterp, model):
    cache = mlxterp.collect_activations(model, TEXT, layers=["layers.1", "layers.0.up"])
    assert sorted(cache.keys()) == ["layers.0.up", "layers.1"]
    with model.trace(TEXT) as trace:
        pass
    for name in ("layers.1", "model.layers.1", "model.model.layers.1"):
        assert mx.array_equal(cache.get(name), trace.activations["model.layers.1"])
    assert "layers.2" not in cache
    assert len(mlxterp.collect_activations(model, TEXT)) == 4 * LAYERS


@pytest.mark.parametrize("name", ["SAE", "SAETrainer", "visualization"])
def test_what_is_out_of_scope_says_so(mlxterp, name):
    with pytest.raises(ImportError, match=rf"metalens has no mlxterp\.{name} \(.*Use mlxterp itself"):
        getattr(mlxterp, name)
    with pytest.raises(metalens.MetalensError, match=name):
        exec(f"from metalens.compat.mlxterp import {name}")
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = mlxterp.nonsense


@pytest.mark.parametrize("name", ["activation_patching", "train_sae", "train_crosscoder"])
def test_methods_that_are_out_of_scope_say_so(model, name):
    with pytest.raises(AttributeError, match=rf"metalens has no {name} of mlxterp \("):
        getattr(model, name)
    with pytest.raises(AttributeError, match="object has no attribute 'nonsense'"):
        _ = model.nonsense
