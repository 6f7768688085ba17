"""Trajectories: every statistic against float64 NumPy, slices, several texts, parts of long texts, the embedding, masks."""

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel, TunedLens
from metalens.readings import (
    EMBEDDING,
    STATISTICS,
    join_trajectories,
    layer_of_upstream,
    read_trajectory,
    read_trajectory_parts,
    source,
    upstream_layer,
)
from support import oracle
from support.mocks import LAYERS, VOCAB, MockModel, WordTokenizer, float64_logits, random_lens, tiny_llama

IDS = [3, 1, 4, 1, 5, 9, 2]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def model():
    return InterpretableModel(MockModel(), WordTokenizer())


@pytest.fixture
def llama():
    return InterpretableModel(tiny_llama(), WordTokenizer(96))


def assert_statistics(t, z, z_model, targets, anti_targets):
    """Compare with float64 logits [R, T, V] of the lens and [T, V] of the model."""
    log_q, log_p = oracle.log_softmax(z), oracle.log_softmax(z_model)

    def of(ids):
        known = np.broadcast_to(np.asarray(ids) >= 0, z.shape[:2])
        values = np.take_along_axis(log_q, np.maximum(ids, 0)[None, :, None].repeat(len(z), 0), axis=-1)[..., 0]
        return np.where(known, values, np.nan)

    targets, anti_targets = np.asarray(targets), np.asarray(anti_targets)
    expected = {
        "entropy": oracle.entropy(z),
        "max_probability": np.exp(log_q).max(-1),
        "kl": oracle.kl(z_model, z),
        "reverse_kl": oracle.kl(z, z_model),
        "cross_entropy": -of(targets),
        "rank": np.where(np.isnan(of(targets)), -1, 1 + (log_q > of(targets)[..., None]).sum(-1)),
        "log_prob_difference": of(targets) - of(anti_targets),
        "agrees": z.argmax(-1) == z_model.argmax(-1),
    }
    assert t.statistics().keys() == expected.keys() == STATISTICS.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(t, name), values, **CLOSE, err_msg=name)
    order = np.argsort(-log_q, axis=-1)[..., : t.top_ids.shape[-1]]
    np.testing.assert_array_equal(t.top_ids, order)
    np.testing.assert_allclose(t.top_probabilities, np.exp(np.take_along_axis(log_q, order, -1)), **CLOSE)
    np.testing.assert_allclose(t.model.entropy[0], oracle.entropy(z_model), **CLOSE)
    np.testing.assert_allclose(t.model.kl[0], 0, atol=1e-5)
    for i, token in enumerate(t.chosen_ids):
        np.testing.assert_allclose(t.chosen_probabilities[i], np.exp(log_q[..., token]), **CLOSE)
        np.testing.assert_array_equal(t.chosen_ranks[i], 1 + (log_q > log_q[..., token, None]).sum(-1))
        np.testing.assert_allclose(t.model.chosen_probabilities[i, 0], np.exp(log_p[:, token]), **CLOSE)


def test_every_statistic_equals_float64(model):
    anti = [7, 8, 9, -1, 0, 1, 2]
    t = read_trajectory(model, IDS, top_k=4, tokens=[17, "w4"], anti_targets=anti)
    z = np.stack(float64_logits(model.model, np.array(IDS)))
    assert t.layers == tuple(range(LAYERS))
    assert t.target_ids.tolist() == [*IDS[1:], -1]
    assert_statistics(t, z, z[-1], [*IDS[1:], -1], anti)


def test_targets_of_ones_own(model):
    targets = [0, 99, 5, -1, 5, 5, 5]
    t = model.trajectory(mx.array(IDS), layers=[2, 0], targets=targets, anti_targets=IDS)
    z = np.stack(float64_logits(model.model, np.array(IDS)))[[2, 0]]
    assert_statistics(t, z, float64_logits(model.model, np.array(IDS))[-1], targets, IDS)


def test_a_tuned_lens(model):
    lens = random_lens()
    t = model.trajectory(IDS, lens, top_k=3)
    hidden = model.capture(IDS).hidden
    for layer in range(LAYERS):
        z = oracle.wide(model.unembed(lens(hidden[layer][0], layer)))
        np.testing.assert_allclose(t.entropy[layer], oracle.entropy(z), rtol=1e-4)
    assert (t.lens, t.untranslated) == ("tuned lens", ())


def test_prediction_depth(model):
    t = model.trajectory(IDS)
    best = np.stack(float64_logits(model.model, np.array(IDS))).argmax(-1)
    expected = [min(r for r in range(LAYERS + 1) if (best[r:, i] == best[-1, i]).all()) for i in range(len(IDS))]
    assert t.prediction_depth.tolist() == expected
    assert t.select(layers=[0]).prediction_depth.tolist() == (best[0] != best[-1]).astype(int).tolist()


def test_the_embedding_is_the_first_row(model):
    t = model.trajectory(IDS, embedding=True, layers=[1])
    assert t.layers == (EMBEDDING, 1)
    z = oracle.wide(model.unembed(model.model.embed_tokens(mx.array(IDS))))
    np.testing.assert_allclose(t.entropy[0], oracle.entropy(z), rtol=1e-4)
    assert t.row(EMBEDDING) == 0
    lens = random_lens()
    assert model.trajectory(IDS, lens, embedding=True).untranslated == (EMBEDDING,)
    assert model.trajectory(IDS, lens, embedding=True).label(EMBEDDING) == "embedding*"
    rng = np.random.default_rng(1)
    a, b = oracle.random_array(rng, 32, 32, scale=0.2), oracle.random_array(rng, 32)
    lens.embedding_translator = TunedLens(1, 32).translators[0]
    lens.embedding_translator.weight, lens.embedding_translator.bias = mx.eye(32) + a, b
    h = model.model.embed_tokens(mx.array(IDS))
    z = oracle.wide(model.unembed(h + h @ a.T + b))
    t = model.trajectory(IDS, lens, embedding=True)
    np.testing.assert_allclose(t.entropy[0], oracle.entropy(z), rtol=1e-4)
    assert t.untranslated == ()


def test_numbers_of_tuned_lens():
    assert [upstream_layer(layer) for layer in (EMBEDDING, 0, 5)] == [0, 1, 6]
    assert [layer_of_upstream(number) for number in (0, 1, 6)] == [EMBEDDING, 0, 5]
    with pytest.raises(ValueError, match="no layer -1"):
        layer_of_upstream(-1)


def test_mask_input_rules_the_text_out(model):
    t = model.trajectory(IDS, mask_input=True, top_k=VOCAB - len(set(IDS)), tokens=[3])
    z = np.stack(float64_logits(model.model, np.array(IDS)))
    z[..., IDS] = -np.inf
    np.testing.assert_allclose(t.entropy, oracle.entropy(z), **CLOSE)
    np.testing.assert_allclose(t.kl, oracle.kl(z[-1], z), **CLOSE)
    assert not set(IDS) & set(t.top_ids.reshape(-1).tolist())
    assert (t.chosen_probabilities == 0).all()
    assert (t.target_ids, t.cross_entropy) == (None, None)
    with pytest.raises(ValueError, match="rules out every token"):
        model.trajectory(list(range(VOCAB)), mask_input=True)


@pytest.mark.parametrize("lens", [None, "tuned"])
def test_a_long_text_in_parts_equals_one_pass(llama, monkeypatch, lens):
    ids = np.random.default_rng(0).integers(0, 96, 50).tolist()
    lens = TunedLens(2, 64) if lens else None
    whole = llama.trajectory(ids, lens, embedding=True, tokens=[5], anti_targets=ids)
    monkeypatch.setattr(source, "ROWS_BYTES", 1)  # parts of 16 tokens
    parts = llama.trajectory(ids, lens, embedding=True, tokens=[5], anti_targets=ids)
    for name, values in whole.to_numpy().items():
        np.testing.assert_allclose(parts.to_numpy()[name], values, rtol=1e-4, atol=1e-4, err_msg=name)
    part = llama.trajectory(ids, lens, position=-3, embedding=True)
    np.testing.assert_allclose(part.kl[:, 0], whole.kl[:, 47], rtol=1e-4, atol=1e-4)
    assert (part.first_position, part.target_ids.tolist()) == (47, [ids[48]])


def test_parts_one_after_another(llama):
    ids = np.random.default_rng(0).integers(0, 96, 50).tolist()
    whole = llama.trajectory(ids, embedding=True, tokens=[5])
    parts = list(read_trajectory_parts(llama, ids, part_size=20, embedding=True, tokens=[5]))
    assert [(part.first_position, len(part)) for part in parts] == [(0, 20), (20, 20), (40, 10)]
    assert parts[0].target_ids.tolist() == ids[1:21]
    joined = join_trajectories(parts)
    for name, values in whole.to_numpy().items():
        if name != "top_ids":
            np.testing.assert_allclose(joined.to_numpy()[name], values, rtol=1e-3, atol=1e-4, err_msg=name)
    assert joined.tokens == whole.tokens
    np.testing.assert_array_equal(joined.model.rank, whole.model.rank)
    np.testing.assert_allclose(joined.compare(whole).tv, 0, atol=1e-4)
    for wrong, message in (([], "no trajectory"), (parts[::-1], "not neighboring"), ([parts[0], parts[2]], "not neighboring")):
        with pytest.raises(ValueError, match=message):
            join_trajectories(wrong)
    with pytest.raises(ValueError, match="part_size must be at least 1"):
        read_trajectory_parts(llama, ids, part_size=0)
    with pytest.raises(TypeError, match="no option colour; it has top_k"):
        read_trajectory_parts(llama, ids, colour=1)
    with pytest.raises(TypeError, match="One text is read"):
        read_trajectory_parts(llama, ["w1", "w2"])


def test_parts_of_different_trajectories_are_not_joined(llama):
    ids = np.random.default_rng(0).integers(0, 96, 20).tolist()
    other = InterpretableModel(tiny_llama(seed=1), WordTokenizer(96))
    lens, second = TunedLens(2, 64), TunedLens(2, 64)

    def parts(model=llama, text=ids, used=lens, **options):
        return list(read_trajectory_parts(model, text, used, part_size=10, **options))

    first, after = parts()
    assert len(join_trajectories([first, after])) == 20
    for wrong, message in (
        (parts(other), "differ in model"),
        (parts(used=second), "differ in lens"),
        (parts(used=None), "differ in lens"),
        (parts(text=ids[::-1]), "differ in text"),
        (parts(top_k=3), "differ in top_k"),
        (parts(compare=False), "differ in statistics"),
        (parts(anti_targets=ids), "differ in statistics"),
        (parts(mask_input=True), "differ in mask_input, statistics"),
        (parts(skip_norm=True), "differ in final norm"),
        (parts(tokens=[3]), "differ in chosen_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            join_trajectories([first, wrong[1]])
    logit = parts(used=None)
    assert len(join_trajectories([logit[0], parts(used=None)[1]])) == 20  # every logit lens is the same
    steps = [step.trajectory for step in llama.generate_with_lens(ids, max_tokens=4)]
    joined = join_trajectories(steps)
    whole = llama.trajectory(joined.token_ids.tolist(), tokens=[3])
    np.testing.assert_allclose(joined.follow([3]).chosen_probabilities, whole.chosen_probabilities, rtol=1e-3)


@pytest.mark.parametrize("layers", [[0], None])
def test_a_part_counts_the_hidden_states_of_all_blocks(monkeypatch, layers):
    model = InterpretableModel(tiny_llama(layers=5), WordTokenizer(96))
    monkeypatch.setattr(source, "ROWS_BYTES", 2**20)
    size = source.part_size([model.trajectory(IDS, layers=layers).source])
    held = 4 * 64 * (len(layers or range(5)) + 5 + 2)  # bytes for each token: rows, captured outputs, the model's own rows
    assert 2**20 - held < size * held <= 2**20


def test_several_texts(model):
    texts = ["w3 w1 w4", "w5"]
    found = model.trajectory(texts, targets=[[1, 2, 3], [4]])
    for each, text, targets in zip(found, texts, ([1, 2, 3], [4]), strict=True):
        alone = model.trajectory(text, targets=targets)
        np.testing.assert_array_equal(each.cross_entropy, alone.cross_entropy)
        assert each.tokens == alone.tokens == text.split()


def test_select(model):
    t = model.trajectory(IDS, embedding=True, tokens=[5], anti_targets=IDS)
    part = t.select([2, EMBEDDING, -2], slice(-3, None))
    assert (part.layers, part.tokens, part.positions) == ((2, EMBEDDING, 1), ["w5", "w9", "w2"], range(4, 7))
    for name, values in t.to_numpy().items():
        rows = values[:, [3, 0, 2]] if name.startswith("chosen") else values[[3, 0, 2]]
        expected = rows[:, :, -3:] if name.startswith("chosen") else rows[:, -3:]
        np.testing.assert_array_equal(part.to_numpy()[name], expected)
    np.testing.assert_array_equal(part.model.entropy, t.model.entropy[:, -3:])
    assert part.select(positions=5).tokens == ["w9"]
    assert part.select(positions=-1).tokens == ["w2"]
    assert len(t.select()) == len(t)


def test_the_text_form(model):
    assert repr(model.trajectory([3, 1])) == "Trajectory(logit lens, 3 layers x 2 positions: 'w3w1')"


WRONG = [
    ({"targets": [1, 2]}, "targets must have one id for each of the 7 tokens of the text, got \\[2\\]"),
    ({"targets": [1] * 6 + [100]}, "tokens from 0 to 99, or -1 for none; 100 is neither"),
    ({"anti_targets": [1] * 6 + [-2]}, "anti_targets must be tokens"),
    ({"targets": [1.5] * 7}, "targets must be integers"),
    ({"anti_targets": IDS, "mask_input": True}, "Pass targets too"),
    ({"layers": [3]}, "there is no layer 3"),
    ({"layers": []}, "No layers were asked for"),
    ({"position": 7}, "Position 7 is out of bounds"),
    ({"top_k": 101}, "top_k must be from 1 to 100"),
    ({"tokens": ["w3 w4"]}, "no single token; the tokenizer cuts it into \\['w3', 'w4'\\]"),
    ({"tokens": [100]}, "There is no token 100: the model predicts the tokens 0 to 99"),
    ({"tokens": "w3"}, "must be a list of texts and ids"),
    ({"tokens": [1.0]}, "a text or an id"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_wrong_options(model, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model.trajectory(IDS, **options)


def test_wrong_texts_and_lenses(model):
    with pytest.raises(ValueError, match="no tokens in the input"):
        model.trajectory([])
    with pytest.raises(ValueError, match="one entry for each of the 2 texts"):
        model.trajectory([[1, 2], [3]], targets=[[1, 2]])
    with pytest.raises(ValueError, match="trained for another model"):
        model.trajectory(IDS, TunedLens(4, 32))
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.trajectory(IDS, lambda h, layer: h * mx.nan)


def test_parts_of_a_selection(model):
    t = model.trajectory(IDS)
    for layers, positions in (([7], None), (["embedding"], None), (None, 7), (None, slice(3, 3)), (None, slice(0, 5, 2)), ([], None)):
        with pytest.raises(ValueError, match="was not read|Select one layer"):
            t.select(layers, positions)
