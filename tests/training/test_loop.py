import math
import warnings

import mlx.core as mx
import numpy as np
import pytest

from metalens import TunedLens
from metalens.training import TrainingConfig, loss_and_gradient, train_loop, update
from metalens.training.optimizer import gradient_norm
from metalens.training.step import accumulate
from support import oracle

LENGTH = 16


@pytest.fixture
def ids(rng):
    """Four sequences of a text that repeats itself, so that there is something to learn."""
    return mx.array(np.tile(rng.integers(0, 131, 8), 8))


@pytest.fixture
def constant_gradient(monkeypatch):
    """A function that makes every step's gradient ones times a number (one number per step in turn, the last one for the rest), without a model."""

    def use(*factors, losses=()):
        calls = []

        def step(sums, parameters, stream, unembed, done, heads, objective):
            i = len(calls)
            calls.append([np.array(p["weight"]) for p in parameters])
            factor, loss = factors[min(i, len(factors) - 1)], losses[min(i, len(losses) - 1)] if losses else 1.0
            tokens = stream.hidden[0].shape[0] * stream.hidden[0].shape[1]
            whole = factor * tokens * len(parameters)  # the loop divides by tokens and layers
            sums.gradients = [{name: whole * mx.ones_like(value) for name, value in p.items()} for p in parameters]
            sums.losses = mx.full((len(parameters),), loss * tokens)

        monkeypatch.setattr(update, "accumulate", step)
        return calls

    return use


def run(model, ids, callback=None, **settings):
    config = TrainingConfig(**{"num_steps": 4, "max_seq_len": LENGTH} | settings)
    return train_loop(model.source, model.unembed, ids, config, callbacks=[] if callback is None else [callback])


def flat(lens):
    """All weights and biases, less the identity that training starts from."""
    start = TunedLens(lens.num_layers, lens.hidden_dim)
    pairs = zip(lens.translators, start.translators, strict=True)
    return np.concatenate([np.ravel(oracle.wide(a[n]) - oracle.wide(b[n])) for a, b in pairs for n in ("weight", "bias")])


@pytest.mark.usefixtures("each_backend")
def test_training_lowers_the_loss(tiny, ids):
    seen = []
    lens = run(tiny, ids, seen.append, num_steps=40, learning_rate=0.5)
    assert isinstance(lens, TunedLens)
    before, after = (loss_and_gradient(each, tiny.source.capture(ids[None]), tiny.unembed)[0].tolist() for each in (TunedLens(3, 64), lens))
    assert all(b < 0.7 * a for a, b in zip(before[:-1], after[:-1], strict=True))
    assert after[-1] < 1e-2  # the last layer was right from the start
    assert seen[-1].loss < 0.7 * seen[0].loss


def test_the_same_seed_gives_the_same_lens_and_another_one_does_not(tiny, rng):
    ids = mx.array(rng.integers(0, 131, 6 * LENGTH))
    first, again, other, in_order = (flat(run(tiny, ids, seed=seed)) for seed in (1, 1, 2, None))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, in_order)


def test_the_model_is_frozen(tiny, ids):
    before = mx.array(tiny.model(ids[None]))
    run(tiny, ids)
    assert mx.array_equal(tiny.model(ids[None]), before)


def test_progress_is_reported_after_every_step(tiny, ids):
    seen = []
    run(tiny, ids, seen.append, num_steps=3, tokens_per_step=2 * LENGTH + 5)
    assert [p.step for p in seen] == [0, 1, 2]
    assert [p.tokens for p in seen] == [2 * LENGTH, 4 * LENGTH, 6 * LENGTH]
    start = loss_and_gradient(TunedLens(3, 64), tiny.source.capture(ids[None, :LENGTH]), tiny.unembed)[0]
    assert seen[0].losses == pytest.approx(start.tolist(), abs=1e-6)  # from before the update; both sequences are the same here
    assert seen[0].loss == pytest.approx(math.fsum(seen[0].losses) / 3)


def test_no_steps_give_the_identity(tiny, ids):
    seen = []
    assert not flat(run(tiny, ids, seen.append, num_steps=0)).any()
    assert not seen


def test_a_text_that_is_too_short(tiny, ids):
    with pytest.raises(ValueError, match="need at least 65"):
        run(tiny, ids, max_seq_len=65)


def test_sequences_of_a_step_are_averaged(tiny, rng):
    ids = mx.array(rng.integers(0, 131, 3 * LENGTH))
    # The clip is out of reach and the step is one: what changes is the gradient, times 1 + momentum.
    lens = run(tiny, ids, num_steps=1, tokens_per_step=3 * LENGTH, gradient_clip=1e9)
    gradients = [loss_and_gradient(TunedLens(3, 64), tiny.source.capture(s[None]), tiny.unembed)[1]["translators"] for s in ids.reshape(3, LENGTH)]
    mean = np.concatenate([np.ravel(np.mean([oracle.wide(g[i][n]) for g in gradients], axis=0)) for i in range(3) for n in ("weight", "bias")])
    np.testing.assert_allclose(flat(lens), -1.9 * mean, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clip", [1e-3, 0.5])
def test_the_gradient_of_all_layers_together_is_clipped(tiny, ids, constant_gradient, clip, momentum):
    constant_gradient(100.0)
    lens = run(tiny, ids, num_steps=1, learning_rate=0.5, gradient_clip=clip, momentum=momentum)
    assert np.linalg.norm(flat(lens)) == pytest.approx(0.5 * clip * (1 + momentum), rel=1e-3)


def test_the_first_update_of_a_real_gradient_is_within_the_clip(tiny, ids):
    clip = 1e-4
    change = np.linalg.norm(flat(run(tiny, ids, num_steps=1, learning_rate=0.5, gradient_clip=clip)))
    assert 0.99 <= change / (0.5 * clip * 1.9) <= 1.0001


def test_a_gradient_below_the_clip_is_left_alone(tiny, ids, constant_gradient):
    constant_gradient(1e-3)
    lens = run(tiny, ids, num_steps=1, gradient_clip=1.0, momentum=0.0)
    np.testing.assert_allclose(flat(lens), -1e-3, rtol=1e-4)


def nesterov(gradients, learning_rate, momentum, num_steps):
    """Where SGD with Nesterov momentum and a linearly falling learning rate takes a weight from 0; None skips a step."""
    x = velocity = 0.0
    for step, g in enumerate(gradients):
        if g is not None:
            velocity = momentum * velocity + g
            x -= learning_rate * (1 - step / num_steps) * (g + momentum * velocity)
    return x


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_optimizer_is_nesterov_with_linear_decay(tiny, ids, constant_gradient, momentum):
    gradients = [1e-3, -2e-3, 3e-3, 1e-3]
    constant_gradient(*gradients)
    lens = run(tiny, ids, learning_rate=0.5, momentum=momentum, gradient_clip=1e9)
    np.testing.assert_allclose(flat(lens), nesterov(gradients, 0.5, momentum, 4), rtol=1e-3)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("gradient", "loss"), [(NAN, 1.0), (INF, 1.0), (1e-3, NAN), (1e-3, INF), (1e30, 1.0)])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(tiny, ids, constant_gradient, gradient, loss):
    # 1e30 is finite, and its square is not: the norm could not be clipped to.
    seen = []
    calls = constant_gradient(1e-3, 2e-3, gradient, 3e-3, losses=(1.0, 1.0, loss, 1.0))
    with pytest.warns(RuntimeWarning, match="Step 2 has a loss or gradient that is not finite") as caught:
        lens = run(tiny, ids, seen.append, learning_rate=0.5, gradient_clip=1e9)
    assert len(caught) == 1
    assert all(np.array_equal(a, b) for a, b in zip(calls[2], calls[3], strict=True))  # the lens before and after the bad step
    np.testing.assert_allclose(flat(lens), nesterov([1e-3, 2e-3, None, 3e-3], 0.5, 0.9, 4), rtol=1e-3)  # the momentum was not touched either
    assert [p.step for p in seen] == [0, 1, 2, 3]
    assert seen[3].tokens == 4 * LENGTH


def test_training_goes_on_after_a_bad_step(tiny, ids, monkeypatch):
    calls = []

    def once_nan(sums, *others):
        accumulate(sums, *others)
        calls.append(1)
        if len(calls) == 1:
            sums.gradients[1]["bias"] = sums.gradients[1]["bias"] * NAN

    monkeypatch.setattr(update, "accumulate", once_nan)
    seen = []
    with pytest.warns(RuntimeWarning, match="Step 0"):
        lens = run(tiny, ids, seen.append, num_steps=20, learning_rate=0.5)
    assert np.isfinite(flat(lens)).all()
    assert seen[1].losses == pytest.approx(seen[0].losses, abs=1e-6)
    assert seen[-1].loss < 0.9 * seen[0].loss


def test_an_ordinary_run_is_silent(tiny, ids, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tiny, ids)
    assert capfd.readouterr() == ("", "")


def test_the_progress_bar_goes_to_stderr(tiny, ids, capfd):
    train_loop(tiny.source, tiny.unembed, ids, TrainingConfig(num_steps=2, max_seq_len=LENGTH), show_progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "training the lens" in err
    assert "step=2/2" in err


def test_the_norm_is_over_all_layers_together():
    gradients = [{"weight": mx.array([[3.0, 0.0]]), "bias": mx.array([4.0])}, {"weight": mx.array([[12.0]]), "bias": mx.array([0.0])}]
    assert gradient_norm(gradients) == pytest.approx(13.0)


@pytest.mark.parametrize("settings", [{}, {"warm_start_tokens": 32}], ids=["step", "warm start"])
def test_ids_that_the_model_does_not_know_are_an_error(tiny, settings):
    ids = mx.array([1] * 20 + [131] + [1] * 43)
    with pytest.raises(ValueError, match=r"token ids from 1 to 131; the model knows 0 to 130"):
        train_loop(tiny.source, tiny.unembed, ids, TrainingConfig(num_steps=4, max_seq_len=16, tokens_per_step=64, **settings))
