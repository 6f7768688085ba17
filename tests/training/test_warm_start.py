"""The closed-form start against NumPy's least squares in float64."""

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel, TunedLens
from metalens.models.capture import HiddenStates
from metalens.training import Corpus, NotEnoughDataError, TrainingConfig, loss_and_gradient, train_loop
from metalens.training.warm_start import warm_start
from support import oracle

WIDTH = 24


def alone(*values):
    """The sum over a group of one process."""
    return list(values)


def streams(rng, *shapes, layers=3, offset=2.0, dtype=mx.float32):
    """States of uneven scale with a mean, each layer a little nearer to the last one than that before it."""
    scale = np.exp(rng.standard_normal(WIDTH))
    mix = rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5
    found = []
    for shape in shapes:
        h = rng.standard_normal((*shape, WIDTH)) * scale + offset
        hidden = []
        for layer in range(layers):
            hidden.append(mx.array(h.astype(np.float32)).astype(dtype))
            if layer < layers - 1:
                h = h + 0.5 * np.tanh(h @ mix) + 0.3
        found.append(HiddenStates(hidden, mx.zeros(())))
    return found


def rows(given, layer):
    return np.concatenate([oracle.wide(stream.hidden[layer]).reshape(-1, WIDTH) for stream in given])


def expected(given, layer, ridge):
    """Min |h* - h - A h - b|^2 / N + ridge s |A|^2 with s the mean square of the states: least squares with D rows more. Returns I + A, b."""
    h, last = rows(given, layer), rows(given, -1)
    n = len(h)
    s = np.mean(h**2)
    inputs = np.block([[h / n**0.5, np.full((n, 1), n**-0.5)], [np.eye(WIDTH) * (ridge * s) ** 0.5, np.zeros((WIDTH, 1))]])
    outputs = np.concatenate([(last - h) / n**0.5, np.zeros((WIDTH, WIDTH))])
    found = np.linalg.lstsq(inputs, outputs, rcond=None)[0]
    return np.eye(WIDTH) + found[:-1].T, found[-1]


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0, 100.0])
@pytest.mark.usefixtures("cpu_backend")
def test_it_is_ridge_regression(rng, ridge):
    given = streams(rng, (2, 17), (1, 41), (1, 1), (3, 50))
    found = warm_start(given, [0, 1], WIDTH, ridge, alone)
    assert list(found) == [0, 1]
    for layer, solved in found.items():
        weight, bias = expected(given, layer, ridge)
        assert (solved["weight"].dtype, solved["bias"].dtype) == (mx.float32, mx.float32)
        np.testing.assert_allclose(oracle.wide(solved["weight"]), weight, atol=5e-4)  # the sums are in float32
        np.testing.assert_allclose(oracle.wide(solved["bias"]), bias, atol=5e-4)


@pytest.mark.usefixtures("cpu_backend")
def test_a_mean_far_from_0_costs_few_digits(rng):
    """Sums about 0 are 10 times as far off."""
    given = streams(rng, (4, 100), (4, 100), offset=100.0)
    for layer, solved in warm_start(given, [0, 1], WIDTH, 1e-3, alone).items():
        weight, bias = expected(given, layer, 1e-3)
        np.testing.assert_allclose(oracle.wide(solved["weight"]), weight, atol=1e-5)
        np.testing.assert_allclose(oracle.wide(solved["bias"]), bias, atol=5e-3)


def test_fewer_tokens_than_dimensions_need_the_ridge(rng):
    given = streams(rng, (1, WIDTH - 4))
    solved = warm_start(given, [0], WIDTH, 1e-3, alone)[0]
    weight, bias = expected(given, 0, 1e-3)
    np.testing.assert_allclose(oracle.wide(solved["weight"]), weight, atol=1e-3)
    np.testing.assert_allclose(oracle.wide(solved["bias"]), bias, atol=1e-3)


def test_without_a_ridge_they_are_too_few():
    h = mx.zeros((1, 5, WIDTH))
    for ridge in (0.0, 1e-3):
        with pytest.raises(ValueError, match=f"no solution with ridge={ridge}: .* do not span the 24 dimensions .* Raise warm_start_tokens or ridge"):
            warm_start([HiddenStates([h, h], mx.zeros(()))], [0], WIDTH, ridge, alone)


def test_the_bias_is_not_regularized(rng):
    """However strong the ridge is, the lens may move the mean."""
    given = streams(rng, (2, 40))
    solved = warm_start(given, [0], WIDTH, 1e9, alone)[0]
    np.testing.assert_allclose(oracle.wide(solved["weight"]), np.eye(WIDTH), atol=1e-6)
    np.testing.assert_allclose(oracle.wide(solved["bias"]), (rows(given, -1) - rows(given, 0)).mean(axis=0), atol=1e-5)


def test_the_last_layer_is_the_identity_to_the_last_bit(rng):
    solved = warm_start(streams(rng, (1, 60)), [2], WIDTH, 1e-3, alone)[2]
    assert mx.array_equal(solved["weight"], mx.eye(WIDTH))
    assert mx.array_equal(solved["bias"], mx.zeros(WIDTH))


def test_an_affine_map_is_found(rng):
    h, matrix, offset = rng.standard_normal((1, 100, WIDTH)), rng.standard_normal((WIDTH, WIDTH)), rng.standard_normal(WIDTH)
    given = [HiddenStates([mx.array(a.astype(np.float32)) for a in (h, h @ matrix.T + offset)], mx.zeros(()))]
    solved = warm_start(given, [0], WIDTH, 0.0, alone)[0]
    np.testing.assert_allclose(oracle.wide(solved["weight"]), matrix, atol=1e-4)
    np.testing.assert_allclose(oracle.wide(solved["bias"]), offset, atol=1e-4)


def test_bfloat16_states_are_widened(rng):
    given = streams(rng, (2, 40), dtype=mx.bfloat16)
    solved = warm_start(given, [0], WIDTH, 1e-3, alone)[0]
    np.testing.assert_allclose(oracle.wide(solved["weight"]), expected(given, 0, 1e-3)[0], atol=2e-4)


def test_the_sums_of_several_processes_are_added(rng):
    given = streams(rng, (2, 30), (2, 30))
    sums = []

    def noted(*values):
        sums.append(values)
        return list(values)

    whole = warm_start(given, [0, 1], WIDTH, 1e-3, alone)
    warm_start(given[1:], [0, 1], WIDTH, 1e-3, noted)
    theirs = iter(sums)
    both = warm_start(given[:1], [0, 1], WIDTH, 1e-3, lambda *values: [a + b for a, b in zip(values, next(theirs), strict=True)])
    for layer in (0, 1):
        np.testing.assert_allclose(oracle.wide(both[layer]["weight"]), oracle.wide(whole[layer]["weight"]), atol=1e-4)


# What can't be regressed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, -1], ids=["the layer", "the last block"])
def test_states_that_are_not_finite_are_an_error(rng, where, value):
    given = streams(rng, (1, 40))
    given[0].hidden[where][0, 7, 3] = value
    with pytest.raises(ValueError, match="states that are not finite. Look for damaged weights or token ids"):
        warm_start(given, [0], WIDTH, 1e-3, alone)


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="The warm start saw no text"):
        warm_start([], [0], WIDTH, 1e-3, alone)


# In a run


def losses(lens, model, ids):
    return np.array(loss_and_gradient(lens, model.source.capture(ids[None]), model.unembed)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_better_than_the_logit_lens(make_llama, rng, dtype):
    """Also on text that it has not seen; no step is taken."""
    model = InterpretableModel(make_llama())
    seen, unseen = (mx.array(rng.integers(0, 131, size)) for size in (4000, 300))
    config = TrainingConfig(num_steps=0, max_seq_len=50, warm_start_tokens=4000, dtype=dtype)
    lens = train_loop(model.source, model.unembed, seen, config)
    for ids in (seen[:300], unseen):
        before, after = losses(TunedLens(3, 64), model, ids), losses(lens, model, ids)
        assert (after[:-1] < 0.85 * before[:-1]).all()
        assert after[-1] == 0


def test_a_warm_run_begins_where_it_leaves_off(tiny, rng):
    ids = mx.array(rng.integers(0, 131, 40 * 50))
    cold, warm = [], []
    settings = {"num_steps": 8, "max_seq_len": 50, "reduction": "sum", "learning_rate": 0.1}
    train_loop(tiny.source, tiny.unembed, ids, TrainingConfig(**settings), callbacks=[cold.append])
    train_loop(tiny.source, tiny.unembed, ids, TrainingConfig(**settings, warm_start_tokens=30 * 50), callbacks=[warm.append])
    assert warm[0].loss < 0.8 * cold[0].loss
    assert warm[-1].loss < cold[-1].loss
    assert (warm[0].tokens, cold[0].tokens) == (31 * 50, 50)


def test_only_the_chosen_layers_are_solved(tiny, rng):
    ids = mx.array(rng.integers(0, 131, 1000))
    lens = train_loop(tiny.source, tiny.unembed, ids, TrainingConfig(num_steps=0, max_seq_len=50, warm_start_tokens=800, layers=(1,)))
    assert lens.layers == [1]
    assert mx.array_equal(lens.translators[0].weight, mx.eye(64))
    assert not mx.array_equal(lens.translators[1].weight, mx.eye(64))


def test_too_little_text_is_found_out_before_anything_is_computed(tiny, rng, monkeypatch):
    ids = mx.array(rng.integers(0, 131, 10 * 16))
    monkeypatch.setattr(type(tiny.source), "capture", None)
    config = TrainingConfig(num_steps=8, max_seq_len=16, warm_start_tokens=40, repeat=False)  # 8 + 3 sequences of 10
    with pytest.raises(NotEnoughDataError):
        train_loop(tiny.source, tiny.unembed, ids, config)


@pytest.mark.parametrize(("num_steps", "enough"), [(3, True), (4, False)])
def test_whole_sequences_are_counted(tiny, rng, num_steps, enough):
    """A step of 16 tokens takes two documents of 10, and there are seven: three steps, though the tokens would be enough for four."""
    about = {"fingerprint": "", "content": "", "tokenizer": None}
    corpus = Corpus(rng.integers(0, 131, 70).astype(np.int32), np.arange(0, 71, 10), "packed", about=about)
    config, seen = TrainingConfig(num_steps=num_steps, max_seq_len=16, repeat=False), []
    if enough:
        train_loop(tiny.source, tiny.unembed, corpus, config, callbacks=[seen.append])
    else:
        with pytest.raises(NotEnoughDataError, match="4 steps of at least 16 tokens"):
            train_loop(tiny.source, tiny.unembed, corpus, config, callbacks=[seen.append])
    assert len(seen) == (num_steps if enough else 0)
