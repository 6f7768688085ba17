"""Training of the embedding's translator, tuned-lens's layer 0. tests/training/test_paper.py compares it with upstream's rule."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from metalens import TunedLens, train
from metalens.compat import tuned_lens as files
from metalens.models import capture
from metalens.models.capture import EmbeddingStreamError
from metalens.models.layers import EMBEDDING
from metalens.training import CheckpointFolder, MetricsFile, TrainingConfig, TrainingInterruptedError, recipe, train_loop
from support import oracle

LENGTH = 16
SETTINGS = {"num_steps": 4, "max_seq_len": LENGTH, "reduction": "sum", "embedding": True}


@pytest.fixture
def ids(rng):
    return mx.array(rng.integers(0, 131, 6 * LENGTH))


def run(model, ids, **settings):
    seen = []
    start = settings.pop("start", None)
    return train_loop(model.source, model.unembed, ids, TrainingConfig(**SETTINGS | settings), start=start, callbacks=[seen.append]), seen


def bits(lens):
    return {name: np.array(value).tobytes() for name, value in tree_flatten(lens.parameters())}


def test_its_loss_is_that_of_the_input_of_block_0(tiny, ids):
    _, seen = run(tiny, ids, num_steps=1)
    unembedding = oracle.Unembedding(tiny.unembed)
    h = oracle.wide(tiny.model.model.embed_tokens(ids[:LENGTH]))
    z_model = unembedding.logits(oracle.wide(tiny.source.capture(ids[None, :LENGTH]).hidden[-1])[0])
    assert seen[0].layers == [EMBEDDING, 0, 1, 2]
    assert seen[0].losses[0] == pytest.approx(oracle.kl(z_model, unembedding.logits(h)).mean(), abs=1e-5)


@pytest.mark.parametrize("kind", [{}, {"rank": 3}, {"bias_only": True}, {"dtype": "bfloat16"}], ids=["full", "low-rank", "biases", "bfloat16"])
def test_it_is_trained_like_a_block_s_and_leaves_the_others_alone(tiny, ids, kind):
    """Without a clip no layer feels another, so the blocks' translators are those of a run without it."""
    lens, _ = run(tiny, ids, gradient_clip=1e9, **kind)
    without, _ = run(tiny, ids, gradient_clip=1e9, embedding=False, **kind)
    assert lens.translated == [EMBEDDING, 0, 1, 2]
    assert without.embedding_translator is None
    for (name, a), (_, b) in zip(tree_flatten(lens.translators), tree_flatten(without.translators), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-6, err_msg=name)
    weight, bias = lens.dense(EMBEDDING)
    assert mx.max(mx.abs(bias)).item() > 1e-4
    assert ("bias_only" in kind) == mx.array_equal(weight, mx.eye(64)).item()


def test_some_layers_and_a_warm_start(tiny, ids):
    lens, seen = run(tiny, ids, layers=(2,), num_steps=0, warm_start_tokens=5 * LENGTH, ridge=1e-2)
    assert lens.translated == [EMBEDDING, 2]
    assert not seen
    h = oracle.wide(tiny.model.model.embed_tokens(ids[: 5 * LENGTH]))
    last = np.concatenate([oracle.wide(tiny.source.capture(s[None]).hidden[-1])[0] for s in ids[: 5 * LENGTH].reshape(5, LENGTH)])
    means = h.mean(axis=0), (last - h).mean(axis=0)
    squares = h.T @ h / len(h)
    centered = squares - np.outer(means[0], means[0]) + 1e-2 * np.trace(squares) / 64 * np.eye(64)
    expected = np.linalg.solve(centered, h.T @ (last - h) / len(h) - np.outer(*means)).T
    np.testing.assert_allclose(oracle.wide(lens.dense(EMBEDDING)[0]) - np.eye(64), expected, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"layers_at_once": 1, "warm_start_tokens": 40, "optimizer": "muon", "dtype": "bfloat16"}], ids=str)
def test_a_run_that_was_stopped_goes_on(tiny, ids, settings, tmp_path):
    config = TrainingConfig(**SETTINGS | {"seed": 1} | settings)

    def go(**options):
        metrics = MetricsFile(tmp_path / "metrics.jsonl")
        return train_loop(tiny.source, tiny.unembed, ids, config, checkpoints=CheckpointFolder(tmp_path / "state"), callbacks=[metrics], **options)

    left = iter([False, True])
    with pytest.raises(TrainingInterruptedError):
        go(stop=lambda: next(left, True), checkpoint_every=1)
    assert bits(go(resume=True)) == bits(train_loop(tiny.source, tiny.unembed, ids, config))
    layers = [json.loads(line)["layers"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert layers[0] == ([EMBEDDING] if "layers_at_once" in settings else [EMBEDDING, 0, 1, 2])


def test_the_guard_keeps_its_best_state(tiny, rng):
    """A rate that is far too high makes it worse; the guard sets it back to the identity."""
    ids = mx.array(rng.integers(0, 131, 40 * LENGTH))
    with pytest.warns(RuntimeWarning, match="embedding"):
        lens, _ = run(tiny, ids, learning_rate=300.0, gradient_clip=1e9, guard_tokens=LENGTH, momentum=0.0, num_steps=20)
    weight, bias = lens.dense(EMBEDDING)
    assert mx.array_equal(weight, mx.eye(64))
    assert not mx.any(bias).item()


def test_a_lens_with_it_goes_on(tiny, ids, rng):
    start = oracle.random_lens(rng)
    start.embedding_translator = TunedLens(1, 64).translators[0]
    start.embedding_translator.bias = mx.ones((64,))
    kept, _ = run(tiny, ids, start=start, embedding=False, layers=(1,))
    assert mx.array_equal(kept.embedding_translator.bias, mx.ones((64,)))
    trained, _ = run(tiny, ids, start=start)
    assert not mx.array_equal(trained.embedding_translator.bias, mx.ones((64,)))
    untouched, _ = run(tiny, ids, start=start, num_steps=0)
    assert bits(untouched) == bits(start)


def test_a_model_whose_embedding_can_t_be_read_says_how_to_train_without_it(tiny, ids, monkeypatch):
    monkeypatch.setattr(capture, "residual_stream_in", lambda values: None)
    with pytest.raises(EmbeddingStreamError, match=r"can't be read\. Train the blocks alone: set embedding=False \(--no-embedding\)"):
        run(tiny, ids)
    assert run(tiny, ids, embedding=False, num_steps=1)[0].translated == [0, 1, 2]


def test_the_paper_s_lens_in_upstream_s_files(tiny, ids, tmp_path):
    """Every translator of upstream's numbering is there, and comes back."""
    settings = {"recipe": "paper", "num_steps": 2, "max_seq_len": LENGTH, "tokens_per_step": LENGTH}
    lens = train(tiny, np.array(ids).tolist(), **settings)
    assert lens.provenance["training"]["embedding"] is True
    files.save(lens, tmp_path / "folder", "m")
    back = TunedLens.load(tmp_path / "folder")
    assert back.translated == lens.translated
    for layer in (EMBEDDING, 0, 1):
        for a, b in zip(back.dense(layer), lens.dense(layer), strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-7)
            assert np.abs(np.array(b) - (np.eye(64) if b.ndim == 2 else 0)).max() > 1e-5
    assert recipe("adam").embedding
    assert not recipe("fast").embedding
