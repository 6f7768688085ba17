"""Training that goes on from a lens."""

import gc
import json
import weakref

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from metalens import InterpretableModel, TunedLens, train
from metalens.lenses.provenance import lens_hash
from metalens.training import CheckpointFolder, TrainingConfig, TrainingInterruptedError, recipe, train_loop
from metalens.training import start as start_module
from metalens.training.settings import resolve
from metalens.training.start import StartLens
from support import oracle

LENGTH = 16
SETTINGS = {"num_steps": 4, "max_seq_len": LENGTH, "reduction": "sum"}


@pytest.fixture
def ids(rng):
    return mx.array(rng.integers(0, 131, 6 * LENGTH))


def bits(lens):
    return {name: np.array(value).tobytes() for name, value in tree_flatten(lens.parameters())}


def run(model, ids, start=None, **settings):
    seen = []
    lens = train_loop(model.source, model.unembed, ids, TrainingConfig(**SETTINGS | settings), start=start, callbacks=[seen.append])
    return lens, seen


def test_the_first_step_is_one_from_the_lens(tiny, rng, ids):
    """Against float64: the losses before the first step are those of the lens, and one plain step moves it by rate * gradient."""
    start = oracle.random_lens(rng)
    before = bits(start)
    lens, seen = run(tiny, ids, start, num_steps=1, momentum=0.0, gradient_clip=1e9, learning_rate=0.5)
    assert bits(start) == before  # the caller's lens stays as it was
    unembedding, hidden = oracle.Unembedding(tiny.unembed), [oracle.wide(h)[0] for h in tiny.source.capture(ids[None, :LENGTH]).hidden]
    z_model = unembedding.logits(hidden[-1])
    for layer, translator in enumerate(start.translators):
        w, b = oracle.wide(translator.weight), oracle.wide(translator.bias)

        def kl(w=w, b=b, layer=layer):
            return oracle.kl(z_model, unembedding.translated(hidden[layer], w, b)).mean()

        assert seen[0].losses[layer] == pytest.approx(kl(), abs=1e-5)
        moved = oracle.wide(lens.translators[layer].weight) - w
        for index in ((0, 0), (5, 17)):
            assert moved[index] == pytest.approx(-0.5 * oracle.central_difference(kl, w, index), abs=2e-5)


def test_no_steps_leave_the_lens_as_it_is(tiny, rng, ids):
    start = oracle.random_lens(rng)
    assert bits(run(tiny, ids, start, num_steps=0)[0]) == bits(start)


def test_layers_that_are_not_trained_keep_their_translators(tiny, rng, ids):
    start = oracle.random_lens(rng)
    lens, seen = run(tiny, ids, start, layers=(1,))
    assert (seen[0].layers, lens.layers) == ([1], [0, 1, 2])
    for layer in (0, 2):
        assert mx.array_equal(lens.translators[layer].weight, start.translators[layer].weight)
        assert mx.array_equal(lens.translators[layer].bias, start.translators[layer].bias)
    assert not mx.array_equal(lens.translators[1].weight, start.translators[1].weight)


@pytest.mark.parametrize("kind", [{}, {"rank": 2}], ids=["full", "low-rank"])
def test_the_lens_is_float32_also_where_it_is_not_trained(tiny, ids, kind):
    start = TunedLens(3, 64, **kind)
    start.update(tree_map(lambda p: p.astype(mx.bfloat16), start.parameters()))
    lens, _ = run(tiny, ids, start, layers=(1,), num_steps=0)
    assert {value.dtype for _, value in tree_flatten(lens.parameters())} == {mx.float32}
    assert mx.array_equal(lens.translators[0].weight, mx.eye(64))


def test_layers_that_the_lens_does_not_translate_start_at_the_identity(tiny, ids):
    start = TunedLens(3, 64, layers=[2])
    start.translators[2].bias = mx.ones((64,))
    lens, _ = run(tiny, ids, start, num_steps=0)
    assert lens.layers == [0, 1, 2]
    assert mx.array_equal(lens.translators[0].weight, mx.eye(64))
    assert mx.array_equal(lens.translators[2].bias, mx.ones((64,)))


@pytest.mark.parametrize("kind", [{"rank": 3}, {"bias_only": True}], ids=["low-rank", "biases"])
def test_variants(tiny, rng, ids, kind):
    start = TunedLens(3, 64, **kind)
    for translator in start.translators:
        translator.bias = oracle.random_array(rng, 64)
        if "rank" in kind:
            translator.up = oracle.random_array(rng, 64, 3, scale=0.1)
    assert bits(run(tiny, ids, start, num_steps=0, **kind)[0]) == bits(start)
    full, _ = run(tiny, ids, start, num_steps=0)  # full matrices start from every variant
    assert full.variant == "full"
    for layer in range(3):
        for a, b in zip(full.dense(layer), start.dense(layer), strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(b))
    other = {"rank": 5} if "rank" in kind else {"rank": 3}
    with pytest.raises(ValueError, match=rf"The run trains translators of rank {other['rank']}, and the lens to start from has"):
        run(tiny, ids, start, **other)


def test_a_lens_of_another_model(tiny, ids):
    with pytest.raises(ValueError, match="3 of width 64"):
        run(tiny, ids, TunedLens(2, 64))


# ------------------------------------------------------------------ settings


def test_there_is_no_warm_start():
    name, config = resolve("fast", None, {"tokens": 40_000}, from_lens=True)
    assert (name, config.warm_start_tokens) == ("fast", 0)
    assert config.num_steps * config.step_tokens > 30_000  # the budget is for steps
    with pytest.raises(ValueError, match="has no warm start"):
        resolve("fast", None, {"warm_start_tokens": 100}, from_lens=True)
    with pytest.raises(ValueError, match="needs steps"):
        resolve("ridge", None, {}, from_lens=True)


# ------------------------------------------------------------------ train


def tensors(path):
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture
def small(make_llama):
    return InterpretableModel(make_llama())


def test_a_path_and_what_the_lens_remembers(small, rng, tmp_path):
    start, ids = oracle.random_lens(rng), rng.integers(0, 131, 6 * LENGTH).tolist()
    start.provenance = {"model": "base", "tokens": 7, "recipe": "paper", "training": {"much": "more"}}
    start.save(tmp_path / "start")
    settings = {"recipe": "muon", "num_steps": 2, "max_seq_len": LENGTH, "tokens_per_step": LENGTH}
    lens = train(small, ids, start_from=tmp_path / "start", out=tmp_path / "lens", **settings)
    assert bits(lens) == bits(train(small, ids, start_from=start, **settings))
    facts = json.loads((tmp_path / "lens.json").read_text())["origin"]["training"]["start_from"]
    assert facts == {"sha256": lens_hash(start), "path": str(tmp_path / "start"), "model": "base", "tokens": 7, "recipe": "paper"}
    assert lens.provenance["tokens"] == 2 * LENGTH
    before = tensors(tmp_path / "start.npz")
    with pytest.raises(ValueError, match="is read and would be replaced"):
        train(small, ids, start_from=tmp_path / "start", out=tmp_path / "start", force=True, **settings)
    assert all(np.array_equal(before[name], array) for name, array in tensors(tmp_path / "start.npz").items())


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"layers": (1,)}], ids=["whole", "narrow", "some layers"])
def test_the_lens_is_read_and_hashed_once_and_goes_when_the_run_has_its_translators(small, rng, tmp_path, monkeypatch, settings):
    oracle.random_lens(rng).save(tmp_path / "start")
    read, hashed, gone = [], [], []
    load, hash_of = TunedLens.load, start_module.lens_hash
    monkeypatch.setattr(TunedLens, "load", lambda path: read.append(weakref.ref(found := load(path))) or found)
    monkeypatch.setattr(start_module, "lens_hash", lambda lens: hashed.append(1) or hash_of(lens))

    def look(_):
        gc.collect()
        gone.append(read[0]() is None)

    ids = rng.integers(0, 131, 6 * LENGTH).tolist()
    options = {"recipe": "muon", "num_steps": 2, "max_seq_len": LENGTH, "tokens_per_step": LENGTH}
    train(small, ids, start_from=tmp_path / "start", callbacks=[look], **options, **settings)
    assert (len(read), len(hashed), gone) == (1, 1, [True, True])


def test_a_lens_can_be_taken_once(rng):
    start = StartLens(oracle.random_lens(rng))
    start.take()
    with pytest.raises(ValueError, match="Read it again"):
        start.take()


@pytest.mark.parametrize("given", [3, {"translators": []}])
def test_what_is_no_lens(small, ids, given):
    with pytest.raises(TypeError, match="start_from must be a TunedLens, the path of one, or None"):
        train(small, ids, start_from=given, recipe="muon", num_steps=1, max_seq_len=LENGTH, tokens_per_step=LENGTH)


def test_a_lens_that_is_not_there_is_found_out_before_the_model_is_loaded(ids, tmp_path):
    with pytest.raises(FileNotFoundError, match="No lens at"):
        train("no-such-model", ids, start_from=tmp_path / "none", recipe="muon")


def test_a_run_goes_on_from_its_checkpoint_and_from_the_same_lens(tiny, rng, ids, tmp_path):
    start, config = oracle.random_lens(rng), recipe("adam", num_steps=4, max_seq_len=LENGTH, tokens_per_step=LENGTH, layers=(0, 1))
    whole = train_loop(tiny.source, tiny.unembed, ids, config, start=start)

    def go(folder, start, **options):
        return train_loop(tiny.source, tiny.unembed, ids, config, start=start, checkpoints=CheckpointFolder(folder), **options)

    left = iter([False, True])
    with pytest.raises(TrainingInterruptedError):
        go(tmp_path, start, stop=lambda: next(left, True), checkpoint_every=1)
    for other, message in ((None, "and this one starts from no lens"), (oracle.random_lens(rng), "started from the lens sha256:")):
        with pytest.raises(ValueError, match=message):
            go(tmp_path, other, resume=True)
    assert bits(go(tmp_path, start, resume=True)) == bits(whole)
