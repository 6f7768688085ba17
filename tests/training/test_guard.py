"""The guard: no layer ends worse than its best checked state on text that is held back, whatever the optimizer does."""

import warnings

import mlx.core as mx
import numpy as np
import pytest

from metalens.lenses.translators import parameters_of
from metalens.training import (
    Callback,
    CheckpointFolder,
    Corpus,
    Sampler,
    TrainingConfig,
    TrainingInterruptedError,
    batching,
    clock,
    recipe,
    step,
    train_loop,
)
from metalens.training.batching import BatchedCapture
from metalens.training.guard import BestStates, Guard, GuardWarning, check_every, held_back_loss
from metalens.training.optimizer import LensOptimizer
from metalens.training.recipes import RECIPES

LENGTH = 16
SETTINGS = {"num_steps": 12, "max_seq_len": LENGTH, "tokens_per_step": 2 * LENGTH, "seed": 1, "repeat": True, "guard_tokens": 64}
# Each of them makes the loss of this model many times as large in a few steps.
WILD = {
    "sgd": {"optimizer": "sgd", "learning_rate": 1e4, "gradient_clip": 1e4, "reduction": "sum"},
    "adam": {"optimizer": "adam", "learning_rate": 1.0, "reduction": "sum"},
    "muon": {"optimizer": "muon", "learning_rate": 30.0, "reduction": "sum"},
    "muon by the loss": {"optimizer": "muon", "step_size": "loss", "learning_rate": 50.0, "reduction": "sum"},
}


@pytest.fixture(scope="module")
def ids():
    """40 sequences, of which two are held back."""
    return np.random.default_rng(3).integers(0, 131, 40 * LENGTH).astype(np.int32)


def on_held_back(model, ids, config, lens):
    """The KL of every layer on the text that a run holds back, computed anew."""
    text = Sampler(Corpus.from_ids(ids), LENGTH, held_back=config.held_back_tokens).held_back_step()
    assert sum(s.size for s in text.sequences) == text.tokens
    assert text.tokens in (LENGTH, 2 * LENGTH)
    layers = range(len(model.source))
    *kl, tokens = held_back_loss(
        [parameters_of(lens.translators[i]) for i in layers], layers, text, BatchedCapture(model.source, 131), model.unembed
    ).tolist()
    return np.array(kl) / tokens


def config_of(optimizer, **changes):
    return TrainingConfig(**SETTINGS | WILD[optimizer] | {"warm_start_tokens": 20 * LENGTH} | changes)


@pytest.fixture
def checked(monkeypatch):
    """The KL of every layer at every check, in the order of the checks."""
    found_so_far = []
    original = BestStates.worse

    def worse(self, found, parameters):
        found_so_far.append([found[layer] for layer in sorted(found)])
        return original(self, found, parameters)

    monkeypatch.setattr(BestStates, "worse", worse)
    return found_so_far


@pytest.mark.parametrize("optimizer", WILD)
def test_no_layer_ends_worse_than_the_closed_form(tiny, ids, optimizer, checked):
    config = config_of(optimizer)
    with pytest.warns(GuardWarning, match=r"After step \d+ the text that is held back is predicted worse than before by layer \d \(KL "):
        lens = train_loop(tiny.source, tiny.unembed, mx.array(ids), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wild = train_loop(tiny.source, tiny.unembed, mx.array(ids), config_of(optimizer, guard_tokens=0))
    ours, without = (on_held_back(tiny, ids, config, each) for each in (lens, wild))
    closed_form = np.array(checked[0])
    assert (ours <= closed_form + 1e-6).all()
    assert not (without <= closed_form + 1e-6).all()


@pytest.mark.parametrize("optimizer", WILD)
def test_the_lens_is_the_best_checked_state(tiny, ids, optimizer, checked):
    """From the identity. Whatever is checked on the way, nothing was better than what is returned."""
    config = config_of(optimizer, warm_start_tokens=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuardWarning)
        lens = train_loop(tiny.source, tiny.unembed, mx.array(ids), config)
    assert len(checked) >= 2
    assert on_held_back(tiny, ids, config, lens) == pytest.approx(np.min(checked, axis=0), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("name", "wild"), {"paper": "sgd", "adam": "adam", "muon": "muon", "fast": "muon by the loss"}.items())
def test_every_recipe_with_a_guard_of_its_own_uses_it(tiny, ids, name, wild, checked):
    """Nobody asks for the guard, and steps are far too long."""
    settings = {setting: value for setting, value in (SETTINGS | WILD[wild]).items() if setting != "guard_tokens"}
    config = recipe(name, **settings, embedding=False)
    with pytest.warns(GuardWarning):
        lens = train_loop(tiny.source, tiny.unembed, mx.array(ids), config)
    assert (on_held_back(tiny, ids, config, lens) <= np.array(checked[0]) + 1e-6).all()


def test_the_other_recipes_hold_nothing_back():
    """mlxterp's does as its tutorial, and the closed form has no steps."""
    assert {name for name in RECIPES if not recipe(name).held_back_tokens} == {"mlxterp", "ridge"}


def test_what_does_not_rise_is_left_alone(tiny, ids):
    """A calm run with a guard is the run without one on the same text, and says nothing."""
    config = TrainingConfig(**SETTINGS, learning_rate=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lens = train_loop(tiny.source, tiny.unembed, mx.array(ids), config)
    held = Sampler(Corpus.from_ids(ids), LENGTH, held_back=32)._held
    rest = np.concatenate([ids[i * LENGTH : (i + 1) * LENGTH] for i in range(40) if i not in held])
    sampler = Sampler(Corpus.from_ids(ids), LENGTH, seed=1, held_back=32)
    trained = {bytes(s) for s in sampler.take_tokens(38 * LENGTH)}
    assert trained == {bytes(rest[i : i + LENGTH]) for i in range(0, rest.size, LENGTH)}
    assert not trained & {bytes(s) for s in sampler.held_back_step().sequences}
    assert all(not mx.array_equal(t.weight, mx.eye(64)) for t in lens.translators[:2])


def test_a_layer_that_rises_goes_back_and_learns_with_half_the_rate(tiny, ids, monkeypatch):
    """Checked after every step, at a rate that is too high until it was halved a few times."""
    monkeypatch.setattr("metalens.training.guard.TOKENS_PER_CHECKED", 1)
    seen, best, went_back = [], {}, []
    worse, update = BestStates.worse, LensOptimizer.update

    def note_risen(self, found, parameters):
        risen = worse(self, found, parameters)
        best.update({layer: self.parameters[layer]["weight"] for layer in risen})
        return risen

    def note_start(self, layer, parameters, *rest):
        if layer in best:
            went_back.append(mx.array_equal(parameters["weight"], best.pop(layer)))
        return update(self, layer, parameters, *rest)

    monkeypatch.setattr(BestStates, "worse", note_risen)
    monkeypatch.setattr(LensOptimizer, "update", note_start)
    config = config_of("muon", learning_rate=5.0, schedule="constant", layer_rates="equal", num_steps=30)
    with pytest.warns(GuardWarning) as warned:
        train_loop(tiny.source, tiny.unembed, mx.array(ids), config, callbacks=[seen.append])
    assert 2 < len(warned) < 30
    assert len(went_back) > 2
    assert all(went_back)
    assert seen[-1].losses[0] < 1.3 * seen[0].losses[0] < max(p.losses[0] for p in seen)


@pytest.mark.parametrize("optimizer", ["adam", "muon", "muon by the loss"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_in_pieces_is_the_run_in_one(tiny, ids, tmp_path, optimizer, dtype, monkeypatch):
    monkeypatch.setattr("metalens.training.guard.TOKENS_PER_CHECKED", 3)
    config = config_of(optimizer, dtype=dtype, layers_at_once=2)
    said = []

    def run(**options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return train_loop(tiny.source, tiny.unembed, mx.array(ids), config, **options)
            except TrainingInterruptedError:
                return None
            finally:
                said[-1] += [str(w.message) for w in caught if w.category is GuardWarning]

    said.append([])
    straight = run()
    said.append([])
    lens = None
    while lens is None:
        left = iter(range(4))
        lens = run(checkpoints=CheckpointFolder(tmp_path), resume=True, stop=lambda left=left: next(left, None) is None)
    assert said[0] == said[1] != []
    for ours, theirs in zip(lens.translators, straight.translators, strict=True):
        assert mx.array_equal(ours.weight, theirs.weight)
        assert mx.array_equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_stopped_at_any_moment_also_within_a_check(tiny, ids, tmp_path, monkeypatch, cold):
    """Every step and check seems long, and asks at every pause. A check that was interrupted is made again; its checkpoint has the step before it."""
    monkeypatch.setattr(clock, "QUICK", -1.0)
    monkeypatch.setattr(batching, "PASS_TOKENS", LENGTH)
    monkeypatch.setattr(step, "PIECE_WORK", 0)
    monkeypatch.setattr(step, "LEAST_PIECE", 6)
    monkeypatch.setattr("metalens.training.guard.TOKENS_PER_CHECKED", 3)
    config = config_of("muon by the loss", layers_at_once=2, **{"warm_start_tokens": 0} if cold else {})
    within_checks, interruptions = [], []
    kl = Guard.kl

    def watched(self, layers, parameters, pause, done):
        try:
            return kl(self, layers, parameters, pause, done)
        except Exception:
            within_checks.append(list(layers))
            raise

    monkeypatch.setattr(Guard, "kl", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuardWarning)
        straight = train_loop(tiny.source, tiny.unembed, mx.array(ids), config)
        for n in range(1, 3000, 2):
            asked = []
            try:
                lens = train_loop(
                    tiny.source,
                    tiny.unembed,
                    mx.array(ids),
                    config,
                    checkpoints=CheckpointFolder(tmp_path),
                    resume=True,
                    stop=lambda n=n, asked=asked: asked.append(1) or len(asked) >= n,
                )
            except TrainingInterruptedError as error:
                interruptions.append((len(asked) - n, error.learned, bool(CheckpointFolder(tmp_path).steps())))
            else:
                break
    assert all(later == 0 for later, _, _ in interruptions)  # answered where it was asked
    assert all(learned == kept for _, learned, kept in interruptions)
    assert len(within_checks) >= 2
    for ours, theirs in zip(lens.translators, straight.translators, strict=True):
        assert mx.array_equal(ours.weight, theirs.weight)
        assert mx.array_equal(ours.bias, theirs.bias)


def test_the_first_best_state_is_in_the_checkpoint_of_the_warm_start(tiny, ids, tmp_path):
    """It is the closed form."""

    class Killed(Callback):
        def on_checkpoint(self, step, path):
            raise RuntimeError("killed")

    folder = CheckpointFolder(tmp_path)
    with pytest.raises(RuntimeError, match="killed"):
        train_loop(tiny.source, tiny.unembed, mx.array(ids), config_of("muon by the loss"), checkpoints=folder, callbacks=[Killed()])
    saved = folder.latest()
    assert saved.record["checked"] == saved.record["pass_step"] == 0
    for layer in range(len(tiny.source)):
        assert mx.array_equal(saved.arrays[f"best.{layer}.weight"], saved.arrays[f"parameters.{layer}.weight"])
        assert saved.arrays[f"optimizer.inputs.{layer}"].min().item() > 0


@pytest.mark.parametrize(("vocabulary", "cost", "part"), [("full", 0.5, 0.05), ("sampled", 3.0, 0.1)])
def test_the_cost_is_bounded(vocabulary, cost, part):
    """At most a twentieth of a run that is not tiny: a token of a check costs at most half a token of training. Beside samples, a tenth."""
    for steps, per_step in ((400, 16384), (240, 128), (60, 512), (3, 128), (1, 16)):
        settings = {"num_steps": steps, "tokens_per_step": per_step, "max_seq_len": min(per_step, 128), "warm_start_tokens": 4096}
        config = recipe("fast", **settings, vocabulary=vocabulary)
        held = config.held_back_tokens
        assert held <= min(512, config.total_tokens / 16)
        checks = len([step for step in range(1, steps + 1) if step % check_every(config, held) == 0])
        assert 1 <= checks <= 40
        assert checks == 1 or checks * held * cost <= part * steps * per_step


def test_a_short_text_and_a_run_without_steps_have_no_guard(tiny):
    assert recipe("ridge").held_back_tokens == 0
    few = np.arange(15 * LENGTH, dtype=np.int32) % 131
    assert Sampler(Corpus.from_ids(few), LENGTH, held_back=64).held_back_step().sequences == []
    train_loop(tiny.source, tiny.unembed, mx.array(few), TrainingConfig(**SETTINGS))


def test_a_state_that_is_not_finite_is_worse_than_any():
    best = BestStates()
    first, second = {0: {"bias": mx.zeros((3,))}}, {0: {"bias": mx.ones((3,))}}
    assert best.worse({0: 2.0}, first) == []
    assert best.worse({0: float("nan")}, second) == [0]
    assert best.worse({0: 2.1}, second) == []  # within what the guard tolerates
    assert best.worse({0: 2.3}, second) == [0]
    assert best.kl == {0: 2.0}
    assert best.parameters[0]["bias"].tolist() == [0, 0, 0]
    again = BestStates.from_arrays(best.arrays())
    assert again.kl == best.kl
    assert again.parameters[0]["bias"].tolist() == [0, 0, 0]
    assert best.worse({0: 1.0}, second) == []
    assert best.kl == {0: 1.0}


def test_a_layer_without_loss_is_not_worse_by_rounding():
    best = BestStates()
    layer = {2: {"bias": mx.zeros((3,))}}
    assert best.worse({2: 0.0}, layer) == []
    assert best.worse({2: 2e-6}, layer) == []


def test_an_older_checkpoint_goes_on_without_a_guard(tiny, ids, tmp_path):
    """A version that did not know the guard, or steps by the loss, wrote no such settings."""
    import json

    from metalens.training import checkpoint

    old = TrainingConfig(**SETTINGS | {"guard_tokens": 0})
    straight = train_loop(tiny.source, tiny.unembed, mx.array(ids), old)
    left = iter(range(4))
    with pytest.raises(TrainingInterruptedError):
        train_loop(
            tiny.source,
            tiny.unembed,
            mx.array(ids),
            old,
            checkpoints=CheckpointFolder(tmp_path),
            stop=lambda: next(left, None) is None,
        )
    file = next(tmp_path.glob("step-*")) / "state.json"
    record = json.loads(file.read_text())
    for name in ("guard_tokens", "step_size"):
        del record["config"][name]
    del record["record"]
    file.write_text(json.dumps({**record, "record": checkpoint._sha256_of(record)}))
    config = TrainingConfig(**SETTINGS)
    lens = train_loop(tiny.source, tiny.unembed, mx.array(ids), config, checkpoints=CheckpointFolder(tmp_path), resume=True)
    assert all(mx.array_equal(a.weight, b.weight) for a, b in zip(lens.translators, straight.translators, strict=True))


def test_a_lens_remembers_the_settings_of_the_version_that_began(tiny, tmp_path):
    """It was trained without a guard, and does not say that it has one, though the recipe has one now."""
    import json

    from metalens.training import checkpoint, train

    ids, options = list(range(100)) * 60, {"recipe": "muon", "num_steps": 4, "max_seq_len": LENGTH, "tokens_per_step": 2 * LENGTH, "repeat": True}
    with pytest.raises(TrainingInterruptedError):
        train(tiny, ids, **options, guard_tokens=0, checkpoint_dir=tmp_path, checkpoint_every=1, stop=lambda: True)
    file = next(tmp_path.glob("step-*")) / "state.json"
    record = json.loads(file.read_text())
    del record["config"]["guard_tokens"], record["record"]
    file.write_text(json.dumps({**record, "record": checkpoint._sha256_of(record)}))
    lens = train(tiny, ids, **options, checkpoint_dir=tmp_path, checkpoint_every=1, resume=True)
    assert lens.provenance["training"]["guard_tokens"] == 0
    assert train(tiny, ids, **options).provenance["training"]["guard_tokens"] == 512
