"""Changed blocks and their effects, against float64 and blocks that do nothing."""

import json

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel
from metalens.analysis.changed_layers import CHANGES, layer_effects
from metalens.analysis.interventions import (
    Intervention,
    delete_blocks,
    measure_effects,
    permute_blocks,
    replace_block,
    swap_blocks,
)
from metalens.analysis.sequences import sequences_of
from metalens.analysis.serializing import as_json
from support import oracle
from support.mocks import MockModel, float64_logits
from support.planted import planted

LENGTHS = [7, 7, 2, 1]


@pytest.fixture
def text(rng):
    return [rng.integers(0, 100, length) for length in LENGTHS]


def by_hand(order, ids):
    """The logits [T, V] of a MockModel whose blocks run in this order, -1 = none, in float64."""
    changed = MockModel()
    changed.layers = [changed.layers[i] for i in order if i >= 0]
    return float64_logits(changed, ids)[-1]


@pytest.mark.parametrize(
    ("intervention", "order"),
    [
        (delete_blocks([1]), [0, -1, 2]),
        (delete_blocks([0, 2]), [-1, 1, -1]),
        (swap_blocks(0, 2, 3), [2, 1, 0]),
        (permute_blocks([1, 2, 0]), [1, 2, 0]),
        (replace_block(1, 0, 3), [0, 0, 2]),
    ],
)
def test_effects_against_float64(text, intervention, order):
    model = InterpretableModel(MockModel(), accelerate=False)
    found = measure_effects(model, sequences_of(model, text, max_seq_len=7), {"it": intervention}, resamples=50)["it"]
    kl, rise = [], []
    for ids in text:
        if len(ids) < 2:
            continue
        own, changed = float64_logits(model.model, ids)[-1], by_hand(order, ids)
        kl += oracle.kl(own, changed).tolist()
        before, after = (-oracle.log_softmax(z)[np.arange(len(ids) - 1), ids[1:]] for z in (own, changed))
        rise += (after - before).tolist()
    assert found.kl.value == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.ce.value == pytest.approx(np.mean(rise), rel=1e-4, abs=1e-5)
    assert found.kl.low <= found.kl.value <= found.kl.high


def test_no_change_has_no_effect(text):
    model = InterpretableModel(MockModel(), accelerate=False)
    found = measure_effects(model, sequences_of(model, text), {1: Intervention(), 2: permute_blocks([0, 1, 2])})
    assert found[1].kl.value == pytest.approx(0, abs=1e-6)
    assert found[2].ce.value == pytest.approx(0, abs=1e-6)


def test_a_block_that_does_nothing_is_not_missed(rng):
    """Block 1 is an identity: to delete it changes nothing. Blocks 2 and 3 are equal: to swap them changes nothing."""
    a, b = rng.standard_normal((2, 6, 6))
    model = planted(rng.standard_normal((30, 6)), [a, np.zeros((6, 6)), b, b], rng.standard_normal((30, 6)))
    found = layer_effects(model, rng.integers(0, 30, 20), list(CHANGES), max_seq_len=5, resamples=20)
    kl = {(each.layer, name): effect.kl.value for each in found for name, effect in each.effects.items()}
    # To swap an identity with its neighbor changes nothing either.
    nothing = [(1, "delete"), (1, "mean"), (1, "resample"), (0, "swap"), (1, "swap"), (2, "swap"), (3, "replace")]
    for key in nothing:
        assert kl.pop(key) == pytest.approx(0, abs=1e-6)
    assert (3, "swap") not in kl  # no block follows
    assert min(kl.values()) > 1e-2
    json.dumps(as_json(found), allow_nan=False)


def test_a_single_block(rng):
    model = planted(rng.standard_normal((30, 6)), [rng.standard_normal((6, 6))], rng.standard_normal((30, 6)))
    found = layer_effects(model, rng.integers(0, 30, 20), list(CHANGES), resamples=20)
    assert found[0].effects.keys() == {"delete", "mean", "resample"}


def test_many_interventions_go_through_the_head_in_parts(rng, tiny):
    sequences = [mx.array(rng.integers(0, 131, 5))]
    many = measure_effects(tiny, sequences, {i: delete_blocks([i % 3]) for i in range(20)})
    for i in range(3, 20):
        assert many[i].kl.value == pytest.approx(many[i % 3].kl.value, rel=1e-5)


@pytest.mark.parametrize("call", [lambda: swap_blocks(0, 3, 3), lambda: replace_block(-1, 0, 3)])
def test_blocks_that_are_not_there(call):
    with pytest.raises(ValueError, match="model has blocks 0 to 2; there is no block"):
        call()


def test_arguments_out_of_range(tiny):
    with pytest.raises(ValueError, match=r"no change \['remove'\]; there are delete, mean"):
        layer_effects(tiny, [1, 2, 3], ["remove"])
    with pytest.raises(ValueError, match="Give at least one"):
        layer_effects(tiny, [1, 2, 3], [])
    with pytest.raises(ValueError, match="single token only"):
        layer_effects(tiny, [[1], [2]])
