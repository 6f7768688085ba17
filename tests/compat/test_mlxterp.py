"""mlxterp's lens as its users know it: every test imports it by mlxterp's own names."""

import math
import textwrap
import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import metalens
from support.mocks import DIM, LAYERS, VOCAB, CountingTokenizer, MockModel, WordTokenizer

TEXT = "w3 w1 w4 w1 w5"
# 60 words: CountingTokenizer numbers them 0 to 59, inside the vocabulary, and the 240 of LONG run far past it.
TEXTS = ["the quick brown fox jumps over the lazy dog and so on"] * 5
LONG = TEXTS * 4
QUICK = {"num_steps": 3, "max_seq_len": 20, "verbose": False}


def weights(lens):
    return [np.array(a) for t in lens.translators for a in (t.weight, t.bias)]


def assert_identity(lens):
    for weight, bias in zip(weights(lens)[::2], weights(lens)[1::2], strict=True):
        np.testing.assert_array_equal(weight, np.eye(len(bias)))
        np.testing.assert_array_equal(bias, np.zeros(len(bias)))


def log_probabilities(shape, seed):
    z = np.random.default_rng(seed).normal(0, 2, shape)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


# ---------------------------------------------------------------- names


def test_exports(mlxterp, tuned_lens):
    assert issubclass(mlxterp.InterpretableModel, metalens.InterpretableModel)
    assert mlxterp.TunedLens is tuned_lens.TunedLens
    assert mlxterp.train_tuned_lens is tuned_lens.train_tuned_lens
    assert {"InterpretableModel", "TunedLens", "train_tuned_lens"} <= set(mlxterp.__all__)
    for method in ("logit_lens", "tuned_lens", "train_tuned_lens", "load_tuned_lens", "get_token_predictions", "trace", "encode", "to_str_tokens"):
        assert callable(getattr(mlxterp.InterpretableModel, method))


def test_user_code_runs_unchanged(tmp_path):
    code = """
        import mlx.core as mx
        from mlxterp import InterpretableModel, TunedLens, train_tuned_lens
        from mlxterp.core.module_resolver import find_layer_key_pattern
        from mlxterp.tuned_lens import kl_divergence, log_softmax

        model = InterpretableModel(network, tokenizer=tokenizer)
        for layer, positions in model.logit_lens("w1 w2 w3", top_k=3, layers=[0, 2]).items():
            for token_id, score, token in positions[-1]:
                assert model.token_to_str(token_id) == token, (layer, score)

        with model.trace("w1 w2 w3") as trace:
            saved = model.layers[1].output.save()
        hidden = trace.activations[find_layer_key_pattern(trace.activations, 1)]
        assert mx.allclose(hidden, saved)

        lens = train_tuned_lens(model, ["w1 w2 w3 w4 w5 w6 w7"] * 4, num_steps=2, max_seq_len=14, save_path=path, verbose=False)
        lens = model.load_tuned_lens(path)
        assert isinstance(lens, TunedLens)
        predictions = model.tuned_lens("w1 w2 w3", lens, position=-1, layers=[2])
        assert kl_divergence(log_softmax(trace.output), log_softmax(trace.output)).item() == 0
    """
    names = {"network": MockModel(), "tokenizer": WordTokenizer(), "path": str(tmp_path / "lens")}
    exec(compile(textwrap.dedent(code), "user.py", "exec"), names)
    assert list(names["predictions"]) == [2]


# ---------------------------------------------------------------- TunedLens


def test_a_lens_has_one_linear_layer_per_block(tuned_lens):
    lens = tuned_lens.TunedLens(num_layers=4, hidden_dim=16)
    assert (lens.num_layers, lens.hidden_dim, len(lens.translators)) == (4, 16, 4)
    assert all(isinstance(t, nn.Linear) and t.weight.shape == (16, 16) and t.bias.shape == (16,) for t in lens.translators)


def test_a_new_lens_is_the_identity(tuned_lens):
    lens = tuned_lens.TunedLens(3, 8)
    assert_identity(lens)
    h = mx.random.normal((2, 5, 8))
    for layer in range(3):
        np.testing.assert_allclose(np.array(lens(h, layer)), np.array(h), rtol=1e-6)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8)])
def test_states_keep_their_shape(tuned_lens, shape):
    lens = tuned_lens.TunedLens(2, 8)
    lens.translators[1].weight, lens.translators[1].bias = 2 * mx.eye(8), mx.ones((8,))
    h = mx.random.normal(shape)
    found = lens(h, 1)
    assert found.shape == shape
    np.testing.assert_allclose(np.array(found), 2 * np.array(h) + 1, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", [-1, 2, 10])
def test_an_index_that_is_no_layer(tuned_lens, layer):
    with pytest.raises(ValueError, match="out of range"):
        tuned_lens.TunedLens(2, 8)(mx.zeros((8,)), layer)


@pytest.mark.parametrize("suffix", ["", ".npz", ".json"])
def test_saving_and_loading(tuned_lens, tmp_path, suffix):
    lens = tuned_lens.TunedLens(2, 8)
    lens.translators[0].weight, lens.translators[1].bias = mx.random.normal((8, 8)), mx.random.normal((8,))
    lens.save(str(tmp_path / f"lens{suffix}"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lens.json", "lens.npz"]
    loaded = tuned_lens.TunedLens.load(str(tmp_path / f"lens{suffix}"))
    assert isinstance(loaded, tuned_lens.TunedLens)
    for a, b in zip(weights(loaded), weights(lens), strict=True):
        np.testing.assert_array_equal(a, b)


def test_files_written_by_mlxterp_load(tuned_lens, tmp_path):
    """Its format, written by hand: compact JSON order aside, the names and shapes of the arrays are all there is."""
    rng = np.random.default_rng(0)
    arrays = {f"translators_{i}_weight": rng.normal(size=(4, 4)).astype(np.float32) for i in range(2)}
    arrays |= {f"translators_{i}_bias": rng.normal(size=4).astype(np.float32) for i in range(2)}
    np.savez(tmp_path / "old.npz", **arrays)
    (tmp_path / "old.json").write_text('{\n  "num_layers": 2,\n  "hidden_dim": 4\n}')
    lens = tuned_lens.TunedLens.load(tmp_path / "old")
    np.testing.assert_array_equal(np.array(lens.translators[1].weight), arrays["translators_1_weight"])
    h = rng.normal(size=4).astype(np.float32)
    np.testing.assert_allclose(
        np.array(lens(mx.array(h), 0)), arrays["translators_0_weight"] @ h + arrays["translators_0_bias"], rtol=1e-4, atol=1e-5
    )


# ---------------------------------------------------------------- kl_divergence, log_softmax


def test_no_divergence_from_itself(tuned_lens):
    log_p = mx.array(log_probabilities((3, 50), 0).astype(np.float32))
    assert tuned_lens.kl_divergence(log_p, log_p).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(50,), (3, 50), (2, 3, 50)])
def test_divergence_is_the_mean_over_rows(tuned_lens, shape):
    log_p, log_q = log_probabilities(shape, 0), log_probabilities(shape, 1)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()
    found = tuned_lens.kl_divergence(mx.array(log_p.astype(np.float32)), mx.array(log_q.astype(np.float32)))
    assert found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0


def test_divergence_has_a_direction(tuned_lens):
    log_p, log_q = (mx.array(log_probabilities((4, 20), seed).astype(np.float32)) for seed in (0, 1))
    assert tuned_lens.kl_divergence(log_p, log_q).item() != pytest.approx(tuned_lens.kl_divergence(log_q, log_p).item(), rel=1e-3)


def test_divergence_can_be_differentiated(tuned_lens):
    z = mx.array(np.random.default_rng(1).normal(size=(3, 10)).astype(np.float32))
    log_p = mx.array(log_probabilities((3, 10), 0).astype(np.float32))
    gradient = mx.grad(lambda z: tuned_lens.kl_divergence(log_p, tuned_lens.log_softmax(z)))(z)
    np.testing.assert_allclose(np.array(gradient), (np.exp(np.array(tuned_lens.log_softmax(z))) - np.exp(np.array(log_p))) / 3, atol=1e-5)


@pytest.mark.parametrize("axis", [-1, 0])
def test_log_softmax(tuned_lens, axis):
    z = np.random.default_rng(0).normal(0, 30, (4, 6)).astype(np.float32)
    z[0, 0] = 1000  # no overflow
    found = np.array(tuned_lens.log_softmax(mx.array(z), axis=axis))
    shifted = z.astype(np.float64) - z.max(axis=axis, keepdims=True)
    np.testing.assert_allclose(found, shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True)), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(np.array(tuned_lens.log_softmax(mx.array(z))), np.array(tuned_lens.log_softmax(mx.array(z), axis=-1)))


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("tokenizer", [WordTokenizer, CountingTokenizer])
def test_arrays_of_ids_are_read(mlxterp, tokenizer):
    model = mlxterp.InterpretableModel(MockModel(), tokenizer())
    found = model.tuned_lens(mx.array([[1, 2, 3, 4, 5]]), mlxterp.TunedLens(LAYERS, DIM))
    assert list(found) == [0, 1, 2]
    assert all(len(positions) == 5 and all(len(position) == 1 for position in positions) for positions in found.values())
    token_id, score, token = found[2][4][0]
    assert type(token_id) is int
    assert 0 <= token_id < VOCAB
    assert type(score) is float
    assert token == f"w{token_id}"
    assert model.tuned_lens(mx.array([1, 2, 3, 4, 5]), mlxterp.TunedLens(LAYERS, DIM)) == found


def test_layers(mlxterp, model):
    lens = mlxterp.TunedLens(LAYERS, DIM)
    everything = model.tuned_lens(TEXT, lens)
    found = model.tuned_lens(TEXT, lens, layers=[2, 0])
    assert list(found) == [2, 0]
    for layer, positions in found.items():
        assert [p[0][0] for p in positions] == [p[0][0] for p in everything[layer]]
    assert model.tuned_lens(TEXT, lens, layers=[]) == {}
    assert model.logit_lens(TEXT, layers=[]) == {}


@pytest.mark.parametrize("position", [0, 3, -1])
def test_a_position(mlxterp, model, position):
    lens = mlxterp.TunedLens(LAYERS, DIM)
    everything, found = model.tuned_lens(TEXT, lens), model.tuned_lens(TEXT, lens, position=position)
    assert [len(positions) for positions in found.values()] == [1] * LAYERS
    assert [positions[0][0][0] for positions in found.values()] == [positions[position][0][0] for positions in everything.values()]


def test_a_position_past_the_end(mlxterp, model):
    with pytest.raises(ValueError, match=r"Position 99 is out of bounds for sequence length 5\. Valid range: \[-5, 4\]"):
        model.tuned_lens(TEXT, mlxterp.TunedLens(LAYERS, DIM), position=99)
    with pytest.raises(ValueError, match="Position 99 is out of bounds"):
        model.logit_lens(TEXT, position=99)


@pytest.mark.parametrize("top_k", [1, 5, VOCAB])
def test_top_k(mlxterp, model, top_k):
    for positions in model.tuned_lens(TEXT, mlxterp.TunedLens(LAYERS, DIM), top_k=top_k).values():
        for position in positions:
            assert len({i for i, _, _ in position}) == top_k
            assert [z for _, z, _ in position] == sorted((z for _, z, _ in position), reverse=True)


def test_a_new_lens_predicts_what_the_logit_lens_does(mlxterp, model):
    tuned, logit = model.tuned_lens(TEXT, mlxterp.TunedLens(LAYERS, DIM), top_k=5), model.logit_lens(TEXT, top_k=5)
    for layer, positions in logit.items():
        for a, b in zip(tuned[layer], positions, strict=True):
            assert [(i, s) for i, _, s in a] == [(i, s) for i, _, s in b]
            np.testing.assert_allclose([z for _, z, _ in a], [z for _, z, _ in b], rtol=1e-5, atol=1e-5)


def test_a_changed_lens_predicts_something_else(mlxterp, model):
    lens = mlxterp.TunedLens(LAYERS, DIM)
    before = model.tuned_lens(TEXT, lens, top_k=5)
    lens.translators[1].weight = -mx.eye(DIM)
    after = model.tuned_lens(TEXT, lens, top_k=5)
    assert after[1] != before[1]
    assert [i for p in after[0] for i, _, _ in p] == [i for p in before[0] for i, _, _ in p]


def test_norm_options(mlxterp, model):
    lens = mlxterp.TunedLens(LAYERS, DIM)
    plain = model.tuned_lens(TEXT, lens, top_k=3)
    assert model.tuned_lens(TEXT, lens, top_k=3, skip_norm=True) != plain
    assert model.tuned_lens(TEXT, lens, top_k=3, final_norm=nn.LayerNorm(DIM)) != plain


@pytest.mark.parametrize("size", [(LAYERS - 1, DIM), (LAYERS + 1, DIM), (LAYERS, DIM * 2)])
def test_a_lens_of_another_model(mlxterp, model, tmp_path, size):
    mlxterp.TunedLens(*size).save(tmp_path / "other")
    with pytest.raises(ValueError, match="another model"):
        model.tuned_lens(TEXT, mlxterp.TunedLens(*size))
    with pytest.raises(ValueError, match="another model"):
        model.load_tuned_lens(tmp_path / "other")


def test_states_and_heads(model):
    with model.trace(TEXT):
        hidden = model.layers[LAYERS - 1].output.save()
    state = model.model.norm(hidden)[0, -1]
    ids = model.get_token_predictions(state, top_k=3)
    assert ids == [i for i, _, _ in model.logit_lens(TEXT, top_k=3, position=-1)[LAYERS - 1][0]]
    pairs = model.get_token_predictions(state, top_k=3, return_scores=True, lm_head=model.model.lm_head)
    assert [i for i, _ in pairs] == ids


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("way", ["function", "method"])
def test_training_gives_a_lens_of_the_models_size(mlxterp, model, way):
    lens = model.train_tuned_lens(TEXTS, **QUICK) if way == "method" else mlxterp.train_tuned_lens(model, TEXTS, **QUICK)
    assert isinstance(lens, mlxterp.TunedLens)
    assert (lens.num_layers, lens.hidden_dim) == (LAYERS, DIM)


def test_the_callback_sees_every_step(mlxterp, model):
    calls = []
    mlxterp.train_tuned_lens(model, TEXTS, **QUICK, callback=lambda step, loss: calls.append((step, loss)))
    assert [step for step, _ in calls] == [0, 1, 2]
    assert all(type(step) is int and type(loss) is float and math.isfinite(loss) and loss >= 0 for step, loss in calls)


def test_training_lowers_the_loss(mlxterp, model):
    losses = []
    mlxterp.train_tuned_lens(model, TEXTS, 30, max_seq_len=60, verbose=False, callback=lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.8 * losses[0]


def test_training_changes_weights(mlxterp, model):
    lens = mlxterp.train_tuned_lens(model, TEXTS, **QUICK)
    assert all(np.isfinite(a).all() for a in weights(lens))
    # The last layer already is what the model does; the others must have moved.
    assert all(np.abs(weights(lens)[2 * layer] - np.eye(DIM)).max() > 1e-4 for layer in range(LAYERS - 1))


def test_training_saves(mlxterp, model, tmp_path):
    lens = mlxterp.train_tuned_lens(model, TEXTS, **QUICK, save_path=str(tmp_path / "missing" / "Mock-1.5"))
    assert sorted(file.name for file in (tmp_path / "missing").iterdir()) == ["Mock-1.5.json", "Mock-1.5.npz"]
    for a, b in zip(weights(model.load_tuned_lens(tmp_path / "missing" / "Mock-1.5")), weights(lens), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [([], "Dataset is empty"), (["", "  "], "only empty or whitespace"), (["a b c"], "Dataset too small: 3 tokens, need at least 20")],
)
def test_datasets_that_are_too_small(mlxterp, model, dataset, message):
    with pytest.raises(ValueError, match=message):
        mlxterp.train_tuned_lens(model, dataset, **QUICK)


def test_sequences_that_are_too_short(mlxterp, model):
    with pytest.raises(ValueError, match=r"max_seq_len \(9\) is too small\. Must be at least 10 tokens"):
        mlxterp.train_tuned_lens(model, TEXTS, 1, max_seq_len=9)


def test_steps_are_clipped(mlxterp, model):
    moved = []
    for clip in (1e-4, 1.0):
        lens = mlxterp.train_tuned_lens(model, TEXTS, 1, max_seq_len=20, gradient_clip=clip, verbose=False)
        moved.append(max(np.abs(w - np.eye(DIM)).max() for w in weights(lens)[::2]))
    assert moved[0] < 1e-3
    assert moved[0] < moved[1]


def test_no_steps(mlxterp, model):
    assert_identity(mlxterp.train_tuned_lens(model, TEXTS, 0, max_seq_len=20, verbose=True))


@pytest.mark.parametrize("verbose", [True, False])
def test_nothing_is_printed_on_stdout(mlxterp, model, capsys, verbose):
    mlxterp.train_tuned_lens(model, TEXTS, **(QUICK | {"verbose": verbose}))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert bool(shown.err) == verbose


# ---------------------------------------------------------------- ids outside the vocabulary


def test_training_data_outside_the_vocabulary_wraps_with_one_warning(mlxterp):
    model = mlxterp.InterpretableModel(MockModel(), CountingTokenizer())
    losses = []
    with pytest.warns(UserWarning, match=r"outside the model's vocabulary \(0 to 99\).*modulo") as caught:
        lens = mlxterp.train_tuned_lens(model, LONG, 4, max_seq_len=120, verbose=False, callback=lambda step, loss: losses.append(loss))
    assert len(caught) == 1
    assert all(map(math.isfinite, losses))
    assert all(np.isfinite(a).all() for a in weights(lens))
    assert any(np.abs(w - np.eye(DIM)).max() > 1e-4 for w in weights(lens)[::2])
    wrapped = mlxterp.train_tuned_lens(model, [[i % VOCAB for i in range(240)]], 4, max_seq_len=120, verbose=False)
    for a, b in zip(weights(lens), weights(wrapped), strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_data_inside_the_vocabulary_does_not_warn(mlxterp):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlxterp.train_tuned_lens(mlxterp.InterpretableModel(MockModel(), CountingTokenizer()), TEXTS, **QUICK)


@pytest.mark.parametrize("ids", [[VOCAB], [-1], mx.array([[0, 500]])])
def test_texts_outside_the_vocabulary_are_never_read(mlxterp, model, ids):
    lens = mlxterp.TunedLens(LAYERS, DIM)
    for use in (model.logit_lens, lambda ids: model.tuned_lens(ids, lens), model.trace, model.capture):
        with pytest.raises(ValueError, match="outside the model's vocabulary"):
            use(ids)


def test_reading_stays_strict_after_training_and_after_a_failed_training(mlxterp):
    model = mlxterp.InterpretableModel(MockModel(), CountingTokenizer())
    with pytest.warns(UserWarning, match="modulo"):
        mlxterp.train_tuned_lens(model, LONG, **QUICK)
    with pytest.raises(TypeError):
        mlxterp.train_tuned_lens(model, [[0.5] * 40], **QUICK)
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        model.logit_lens([VOCAB])


def test_the_package_itself_does_not_wrap():
    model = metalens.InterpretableModel(MockModel(), CountingTokenizer())
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        model.train_tuned_lens(LONG, **QUICK)
