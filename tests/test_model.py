import json
import math
import warnings

import matplotlib as mpl
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import metalens
from metalens import InterpretableModel, TunedLens, train_tuned_lens
from metalens import model as module
from metalens.stream import StreamSource
from mocks import DIM, LAYERS, VOCAB, MockModel, WordTokenizer, float64_logits, llama_config, tiny_llama

TEXT = "w3 w1 w4 w1 w5"
IDS = [3, 1, 4, 1, 5]
DATASET = [" ".join(f"w{(7 * i + j * j) % VOCAB}" for i in range(9)) for j in range(8)]  # 72 tokens
QUICK = {"num_steps": 2, "max_seq_len": 12, "verbose": False}


@pytest.fixture
def model():
    return InterpretableModel(MockModel(), WordTokenizer())


@pytest.fixture
def pictures(monkeypatch):
    """matplotlib without a display; pictures are counted instead of shown."""
    mpl.use("Agg")
    shown = []
    monkeypatch.setattr("matplotlib.pyplot.show", lambda *args, **kwargs: shown.append(args))
    return shown


def assert_close(found, expected, tolerance=1e-4):
    """Equal predictions, up to rounding in the scores."""
    assert list(found) == list(expected)
    for layer, positions in expected.items():
        assert len(found[layer]) == len(positions)
        for a, b in zip(found[layer], positions, strict=True):
            assert [(i, text) for i, _, text in a] == [(i, text) for i, _, text in b]
            np.testing.assert_allclose([z for _, z, _ in a], [z for _, z, _ in b], rtol=tolerance, atol=tolerance)


def expected_predictions(logits, top_k, layers=range(LAYERS)):
    """From float64 logits [T, V] per layer: the documented form."""

    def best(row):
        return [(int(i), row[i], f"w{i}") for i in np.argsort(-row, kind="stable")[:top_k]]

    return {layer: [best(row) for row in logits[layer]] for layer in layers}


def identical(lens):
    return all(np.array_equal(np.array(t.weight), np.eye(lens.hidden_dim)) and not np.array(t.bias).any() for t in lens.translators)


# ---------------------------------------------------------------- construction


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """A folder as mlx-lm's own converter leaves it, and the model that was saved there."""
    folder = tmp_path_factory.mktemp("llama")
    llama = tiny_llama(tied=True)
    llama.save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(llama_config(tied=True)))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w95"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w95").save_pretrained(folder)
    return folder, llama


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_a_model_in_a_folder(saved_model, kind):
    folder, llama = saved_model
    model = InterpretableModel(kind(folder))
    assert model.name == str(folder)
    assert model.encode(TEXT) == IDS
    assert model.token_to_str(4) == "w4"
    found = model.logit_lens(TEXT, top_k=3)
    assert_close(found, InterpretableModel(llama, WordTokenizer()).logit_lens(IDS, top_k=3))
    # The last block's predictions are the model's own.
    assert [p[0][0] for p in found[1]] == mx.argmax(llama(mx.array([IDS])), axis=-1)[0].tolist()


def test_a_loaded_model_trains_a_lens(saved_model, tmp_path):
    model = InterpretableModel(str(saved_model[0]))
    lens = model.train_tuned_lens(["w1 w2 w3 w4 w5 w6"] * 4, save_path=tmp_path / "lens", **QUICK)
    assert (lens.num_layers, lens.hidden_dim) == (2, 64)
    assert_close(model.tuned_lens(TEXT, model.load_tuned_lens(tmp_path / "lens")), model.tuned_lens(TEXT, lens))


def test_the_callers_tokenizer_goes_before_the_loaded_one(saved_model):
    tokenizer = WordTokenizer()
    assert InterpretableModel(str(saved_model[0]), tokenizer).tokenizer is tokenizer


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"Could not load model '.*'\.\nTried the following strategies:\n  1\. mlx-lm failed to load model: .+"):
        InterpretableModel(str(tmp_path))


def test_a_name_that_cannot_be_loaded(monkeypatch):
    def fail(name):
        raise RuntimeError(f"no network for {name}")

    monkeypatch.setattr("mlx_lm.load", fail)
    with pytest.raises(ValueError, match=r"(?s)Could not load model 'who/what'\..*no network for who/what.*InterpretableModel\(model\)") as error:
        InterpretableModel("who/what")
    assert isinstance(error.value.__cause__, RuntimeError)


def test_a_loaded_model_is_taken_as_it_is():
    inner, tokenizer = MockModel(), WordTokenizer()
    model = InterpretableModel(inner, tokenizer)
    assert model.model is inner
    assert model.tokenizer is tokenizer
    assert len(model.layers) == LAYERS
    assert repr(model) == "InterpretableModel(MockModel, 3 layers, tokenizer ✓)"
    assert repr(InterpretableModel(inner)) == "InterpretableModel(MockModel, 3 layers, tokenizer ✗)"


def test_calls_and_parameters_go_to_the_model(model):
    np.testing.assert_array_equal(np.array(model(mx.array([IDS]))), np.array(model.model(mx.array([IDS]))))
    assert model.parameters().keys() == model.model.parameters().keys()
    assert model.trainable_parameters().keys() == model.model.trainable_parameters().keys()
    assert dict(model.named_modules()).keys() == dict(model.model.named_modules()).keys()


def test_a_model_without_blocks():
    with pytest.raises(AttributeError, match="Could not find layers attribute"):
        InterpretableModel(nn.Linear(3, 3))


def test_layer_attr():
    class Renamed(MockModel):
        def __init__(self):
            super().__init__()
            self.stages = self.layers
            del self["layers"]

        def __call__(self, ids):
            x = self.embed_tokens(ids)
            for stage in self.stages:
                x = stage(x)
            return self.lm_head(self.norm(x))

    with pytest.raises(AttributeError, match="layer_attr"):
        InterpretableModel(Renamed())
    model = InterpretableModel(Renamed(), layer_attr="stages")
    assert_close(model.logit_lens(IDS), InterpretableModel(MockModel()).logit_lens(IDS))


# ---------------------------------------------------------------- logit_lens: values


def test_scores_are_raw_logits_of_every_layer(model):
    found = model.logit_lens(TEXT, top_k=7)
    assert_close(found, expected_predictions(float64_logits(model.model, np.array(IDS)), 7))
    for positions in found.values():
        for scores in ([z for _, z, _ in position] for position in positions):
            assert scores == sorted(scores, reverse=True)
    assert all(type(i) is int and type(z) is float and type(s) is str for p in found.values() for q in p for i, z, s in q)


def test_the_last_layer_is_the_model_itself(model):
    own = np.array(model(mx.array([IDS])))[0]
    for position, row in zip(model.logit_lens(TEXT, top_k=VOCAB)[LAYERS - 1], own, strict=True):
        assert sorted(i for i, _, _ in position) == list(range(VOCAB))
        np.testing.assert_allclose([z for _, z, _ in position], row[[i for i, _, _ in position]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "text",
    [IDS, tuple(IDS), np.array(IDS), mx.array(IDS), mx.array([IDS]), mx.array([IDS, [0] * 5]), mx.array(IDS, dtype=mx.uint16)],
    ids=["list", "tuple", "numpy", "array", "batch of one", "row 0 of a batch", "uint16"],
)
def test_text_and_ids_give_the_same(model, text):
    assert_close(model.logit_lens(text, top_k=3), model.logit_lens(TEXT, top_k=3), tolerance=1e-6)


def test_without_a_tokenizer_tokens_are_numbers(model):
    found = InterpretableModel(model.model).logit_lens(IDS, top_k=2)
    assert {layer: [[(i, z, f"w{s}") for i, z, s in p] for p in positions] for layer, positions in found.items()} == model.logit_lens(IDS, top_k=2)


def test_text_without_a_tokenizer(model):
    with pytest.raises(ValueError, match="No tokenizer available. Pass a tokenizer to InterpretableModel"):
        InterpretableModel(model.model).logit_lens(TEXT)


def test_chosen_layers_in_the_order_given(model):
    everything = model.logit_lens(TEXT)
    assert list(everything) == list(range(LAYERS))
    assert_close(model.logit_lens(TEXT, layers=[2, 0]), {2: everything[2], 0: everything[0]})
    assert model.logit_lens(TEXT, layers=[]) == {}


@pytest.mark.parametrize("position", [0, 2, 4, -1, -5])
def test_one_position(model, position):
    everything = model.logit_lens(TEXT, top_k=2)
    assert_close(model.logit_lens(TEXT, top_k=2, position=position), {layer: [positions[position]] for layer, positions in everything.items()})


def test_tied_quantised_heads_name_every_row_whatever_the_tokenizer_says():
    llama = tiny_llama(tied=True)
    nn.quantize(llama, group_size=32, bits=4)
    own = np.array(llama(mx.array([IDS])))[0]
    best = int(own[-1].argmax())
    model = InterpretableModel(llama, WordTokenizer(vocab_size=10))
    assert model.vocab_size == 10
    found = model.logit_lens(IDS, top_k=96)
    assert all(sorted(i for i, _, _ in position) == list(range(96)) for positions in found.values() for position in positions)
    assert found[1][-1][0][0] == best
    for position, row in zip(found[1], own, strict=True):
        np.testing.assert_allclose([z for _, z, _ in position], row[[i for i, _, _ in position]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_16_bit_model_predicts_in_its_last_layer_what_it_predicts_itself(tied):
    llama = tiny_llama(tied=tied)
    llama.set_dtype(mx.bfloat16)
    own = np.array(llama(mx.array([IDS])).astype(mx.float32))[0]
    for position, row in zip(InterpretableModel(llama).logit_lens(IDS, top_k=1)[1], own, strict=True):
        assert row[position[0][0]] >= row.max() - 0.02 * np.abs(row).max()


# ---------------------------------------------------------------- logit_lens: norms


def test_a_norm_in_place_of_the_models_own(model):
    norm = nn.LayerNorm(DIM)
    hidden = model.capture(TEXT).hidden
    expected = [np.array(model.model.lm_head(norm(h[0]))) for h in hidden]
    assert_close(model.logit_lens(TEXT, top_k=2, final_norm=norm), expected_predictions(expected, 2))
    expected = [np.array(model.model.lm_head(3 * h[0])) for h in hidden]
    assert_close(model.logit_lens(TEXT, top_k=2, final_norm=lambda h: 3 * h), expected_predictions(expected, 2))


@pytest.mark.parametrize("options", [{"skip_norm": True}, {"skip_norm": True, "final_norm": lambda h: 0 * h}], ids=["alone", "before final_norm"])
def test_no_norm(model, options):
    expected = [np.array(model.model.lm_head(h[0])) for h in model.capture(TEXT).hidden]
    assert_close(model.logit_lens(TEXT, top_k=2, **options), expected_predictions(expected, 2))


@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(DIM, affine=False)], ids=["Identity", "LayerNorm"])
def test_a_norm_without_parameters_is_still_a_norm(model, norm):
    """Modules are dictionaries, so one without parameters counts as false."""
    expected = [np.array(model.model.lm_head(norm(h[0]))) for h in model.capture(TEXT).hidden]
    assert_close(model.logit_lens(TEXT, top_k=2, final_norm=norm), expected_predictions(expected, 2))


def test_an_unusual_norm_can_be_skipped_without_the_check():
    """skip_norm and final_norm are the way out for a model whose norm is not found."""
    model = InterpretableModel(tiny_llama(), norm_path="model.layers.0.input_layernorm")
    assert list(model.logit_lens(IDS, final_norm=model.model.model.norm)) == [0, 1]
    assert list(model.logit_lens(IDS, skip_norm=True)) == [0, 1]
    with pytest.raises(ValueError, match="norm_path"):
        model.logit_lens(IDS)


# ---------------------------------------------------------------- logit_lens and tuned_lens: errors


@pytest.fixture(params=["logit_lens", "tuned_lens"])
def lens(request, model):
    """Either method, with the same arguments."""
    if request.param == "logit_lens":
        return model.logit_lens
    return lambda text, **options: model.tuned_lens(text, TunedLens(LAYERS, DIM), **options)


@pytest.mark.parametrize("text", ["", "   ", [], mx.array([], dtype=mx.int32)], ids=["empty", "blank", "no ids", "no array"])
def test_empty_text(lens, text):
    with pytest.raises(ValueError, match="no tokens in the input"):
        lens(text)


@pytest.mark.parametrize("text", [[VOCAB], [0, -1], mx.array([[0, 500]]), f"w{VOCAB}"])
def test_ids_outside_the_vocabulary(lens, text):
    with pytest.raises(ValueError, match=r"outside the model's vocabulary \(0 to 99\). Is this the model's own tokenizer"):
        lens(text)


def test_float_ids(lens):
    with pytest.raises(TypeError, match="Token ids must be integers, got float32"):
        lens(mx.array([1.0, 2.0]))


@pytest.mark.parametrize("layers", [[LAYERS], [-1], [0, 17]])
def test_unknown_layers(lens, layers):
    with pytest.raises(ValueError, match=f"The model has layers 0 to {LAYERS - 1}; there is no layer {layers[-1]}"):
        lens(TEXT, layers=layers)


@pytest.mark.parametrize("position", [5, 99, -6])
def test_positions_out_of_range(lens, position):
    with pytest.raises(ValueError, match=rf"Position {position} is out of bounds for sequence length 5\. Valid range: \[-5, 4\]"):
        lens(TEXT, position=position)


@pytest.mark.parametrize("top_k", [0, -1, VOCAB + 1])
def test_top_k_out_of_range(lens, top_k):
    with pytest.raises(ValueError, match=rf"top_k must be from 1 to {VOCAB} \(the vocabulary\), not {top_k}"):
        lens(TEXT, top_k=top_k)


@pytest.mark.parametrize("id_", [1, 50], ids=["a common token", "a rare token"])
def test_damaged_weights_give_no_predictions(lens, model, id_):
    """Also where only the token at hand is damaged, which no check of other tokens can see."""
    weight = np.array(model.model.embed_tokens.weight)
    weight[id_] = np.nan
    model.model.embed_tokens.weight = mx.array(weight)
    with pytest.raises(ValueError, match=r"(?i)nan|damaged"):
        lens([3, id_, 4])


# ---------------------------------------------------------------- tuned_lens


def random_lens(seed=0):
    lens = TunedLens(LAYERS, DIM)
    rng = np.random.default_rng(seed)
    for translator in lens.translators:
        translator.weight = translator.weight + mx.array(rng.normal(0, 0.3, (DIM, DIM)).astype(np.float32))
        translator.bias = mx.array(rng.normal(0, 0.3, DIM).astype(np.float32))
    return lens


def test_a_new_lens_is_the_logit_lens(model):
    assert_close(model.tuned_lens(TEXT, TunedLens(LAYERS, DIM), top_k=4), model.logit_lens(TEXT, top_k=4))


def test_a_lens_translates_before_the_norm(model):
    lens = random_lens()
    expected = [np.array(model.model.lm_head(model.model.norm(lens(h[0], i)))) for i, h in enumerate(model.capture(TEXT).hidden)]
    found = model.tuned_lens(TEXT, lens, top_k=4)
    assert_close(found, expected_predictions(expected, 4))
    assert_close(model.tuned_lens(TEXT, lens, top_k=4, layers=[1], position=-1), {1: [found[1][-1]]})


def test_any_function_is_a_lens(model):
    lens = random_lens()
    assert_close(model.tuned_lens(TEXT, lambda h, layer: lens.translators[layer](h)), model.tuned_lens(TEXT, lens))
    with pytest.raises(TypeError, match="A lens is a TunedLens or a function"):
        model.tuned_lens(TEXT, "lens.npz")


# ---------------------------------------------------------------- read


def test_a_reading_holds_what_the_lenses_return(model):
    lens = random_lens()
    reading = model.read(TEXT, lens, top_k=3, layers=[2, 0])
    assert reading.predictions == model.tuned_lens(TEXT, lens, top_k=3, layers=[2, 0])
    assert reading.layers == [2, 0]
    assert reading.tokens == TEXT.split()
    assert reading.stats.entropy.shape == (2, 5)
    assert model.read(TEXT).predictions == model.logit_lens(TEXT)
    with pytest.raises(ValueError, match="No layers were asked for"):
        model.read(TEXT, layers=[])


@pytest.mark.parametrize("options", [{}, {"skip_norm": True}, {"final_norm": lambda h: -h}, {"position": -2}, {"layers": [0]}], ids=" ".join)
def test_the_models_own_answer_depends_on_no_lens_and_no_norm(model, options):
    logits = np.array(model(mx.array([IDS])))[0].astype(np.float64)
    logits = logits[[-2]] if "position" in options else logits
    reading = model.read(TEXT, random_lens(), **options)
    assert reading.model_tokens == [f"w{row.argmax()}" for row in logits]
    probability = [1 / np.exp(row - row.max()).sum() for row in logits]
    np.testing.assert_allclose(np.array(reading.model.max_probability)[0], probability, rtol=1e-4)


# ---------------------------------------------------------------- plot


@pytest.mark.parametrize(
    "options", [{}, {"position": -1}, {"position": 0}, {"layers": [2, 0]}, {"layers": [1], "position": 2}, {"layers": []}, {"top_k": 3}], ids=str
)
def test_plots_return_the_predictions(lens, options, pictures):
    plain = lens(TEXT, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert lens(TEXT, plot=True, figsize=(3, 2), max_display_tokens=4, cmap="magma", **options) == plain
    assert len(pictures) == (0 if options.get("layers") == [] else 1)


def test_plots_of_other_inputs(model, pictures):
    assert InterpretableModel(model.model).logit_lens(IDS, plot=True, figsize=(3, 2)).keys() == {0, 1, 2}
    assert model.logit_lens(mx.array([IDS]), plot=True, figsize=(3, 2), font_family="DejaVu Sans", max_display_tokens=1).keys() == {0, 1, 2}


def test_plots_change_nothing_else(model, pictures):
    import matplotlib.pyplot as plt

    own, settings, filters = plt.figure(), dict(mpl.rcParams), list(warnings.filters)
    try:
        model.logit_lens(TEXT, plot=True, figsize=(3, 2))
        assert plt.get_fignums() == [own.number], "the caller's figures stay open, and none is added"
        assert plt.gcf() is own
        assert dict(mpl.rcParams) == settings
        assert list(warnings.filters) == filters
    finally:
        plt.close("all")


# ---------------------------------------------------------------- get_token_predictions


def best(logits, k):
    ids = np.argsort(-np.array(logits), kind="stable")[:k]
    return [(int(i), float(np.array(logits)[i])) for i in ids]


def assert_pairs(found, expected):
    assert [i for i, _ in found] == [i for i, _ in expected]
    assert all(type(i) is int and type(z) is float for i, z in found)
    np.testing.assert_allclose([z for _, z in found], [z for _, z in expected], rtol=1e-4, atol=1e-4)


def test_predictions_of_one_state(model):
    state = model.model.norm(model.capture(TEXT).hidden[1])[0, -1]
    expected = best(model.model.lm_head(state), 10)
    assert model.get_token_predictions(state) == [i for i, _ in expected]
    assert model.get_token_predictions(state, top_k=1) == [expected[0][0]]
    assert_pairs(model.get_token_predictions(state, return_scores=True), expected)


def test_predictions_of_several_states(model):
    states = model.model.norm(model.capture(TEXT).hidden[1])[0]
    found = model.get_token_predictions(states, top_k=4, return_scores=True)
    assert len(found) == len(IDS)
    for row, state in zip(found, states, strict=True):
        assert_pairs(row, best(model.model.lm_head(state), 4))
    assert model.get_token_predictions(states, top_k=4) == [[i for i, _ in row] for row in found]


@pytest.mark.parametrize("shape", [(), (1, 5, DIM)])
def test_states_of_other_dimensions(model, shape):
    with pytest.raises(ValueError, match=r"hidden_state must be \[D\] or \[N, D\]"):
        model.get_token_predictions(mx.zeros(shape))


def test_states_of_another_width(model):
    with pytest.raises(ValueError, match=rf"{DIM}"):
        model.get_token_predictions(mx.zeros((DIM + 1,)))


@pytest.mark.parametrize("top_k", [0, -1, VOCAB + 1])
@pytest.mark.parametrize("head", [None, "lm_head"])
def test_top_k_of_states_out_of_range(model, top_k, head):
    with pytest.raises(ValueError, match=rf"top_k must be from 1 to {VOCAB} \(the vocabulary\), not {top_k}"):
        model.get_token_predictions(mx.zeros((DIM,)), top_k=top_k, lm_head=None if head is None else model.model.lm_head)


def test_another_head(model):
    state = mx.array(np.random.default_rng(0).normal(size=DIM).astype(np.float32))
    head = nn.Linear(DIM, 7)
    assert_pairs(model.get_token_predictions(state, 3, True, lm_head=head), best(head(state), 3))
    assert model.get_token_predictions(state[None], 7, lm_head=head) == [[i for i, _ in best(head(state), 7)]]
    assert_pairs(model.get_token_predictions(state, 3, True, lm_head=lambda h: -head(h)), best(-head(state), 3))


@pytest.mark.parametrize("quantised", [False, True])
def test_another_embedding(model, quantised):
    embedding = nn.Embedding(9, DIM)
    embedding = embedding.to_quantized(group_size=32, bits=8) if quantised else embedding
    state = mx.array(np.random.default_rng(0).normal(size=DIM).astype(np.float32))
    assert_pairs(model.get_token_predictions(state, 5, True, embedding_layer=embedding), best(embedding.as_linear(state[None])[0], 5))
    other = nn.Linear(DIM, 7)
    assert_pairs(model.get_token_predictions(state, 5, True, embedding_layer=embedding, lm_head=other), best(other(state), 5))


def test_an_embedding_of_another_kind(model):
    with pytest.raises(TypeError, match="embedding_layer must be an mlx.nn embedding or linear layer"):
        model.get_token_predictions(mx.zeros((DIM,)), embedding_layer="embed_tokens")


# ---------------------------------------------------------------- training


def test_a_trained_lens(model):
    losses = []
    lens = model.train_tuned_lens(DATASET, 40, max_seq_len=24, verbose=False, callback=lambda step, loss: losses.append((step, loss)))
    assert isinstance(lens, TunedLens)
    assert (lens.num_layers, lens.hidden_dim) == (LAYERS, DIM)
    assert [step for step, _ in losses] == list(range(40))
    assert all(type(step) is int and type(loss) is float and math.isfinite(loss) for step, loss in losses)
    # Three sequences take turns: compare whole rounds.
    assert sum(loss for _, loss in losses[-3:]) < 0.7 * sum(loss for _, loss in losses[:3])
    assert not identical(lens)


def test_the_function_is_the_method(model):
    a, b = train_tuned_lens(model, DATASET, **QUICK), model.train_tuned_lens(DATASET, **QUICK)
    for x, y in zip(a.translators, b.translators, strict=True):
        np.testing.assert_array_equal(np.array(x.weight), np.array(y.weight))
        np.testing.assert_array_equal(np.array(x.bias), np.array(y.bias))
    assert metalens.train_tuned_lens is train_tuned_lens


def test_training_leaves_the_model_alone(model):
    before = np.array(model(mx.array([IDS])))
    model.train_tuned_lens(DATASET, **QUICK)
    np.testing.assert_array_equal(np.array(model(mx.array([IDS]))), before)


def test_no_steps(model, tmp_path):
    lens = model.train_tuned_lens(DATASET, 0, max_seq_len=12, save_path=tmp_path / "lens", verbose=True)
    assert identical(lens)
    assert identical(model.load_tuned_lens(tmp_path / "lens"))


@pytest.fixture
def seen(model, monkeypatch):
    """The ids that training runs the model on."""
    sequences, original = [], StreamSource.capture

    def capture(self, ids, *args):
        sequences.append(ids.tolist()[0])
        return original(self, ids, *args)

    _ = model.checked_unembed  # its own check is over before the counting begins
    monkeypatch.setattr(StreamSource, "capture", capture)
    return sequences


@pytest.mark.parametrize("length", [12, 13, 23, 24, 30])
def test_every_token_is_used(model, seen, length):
    ids = [i % VOCAB for i in range(length)]
    model.train_tuned_lens([ids], 4, max_seq_len=12, verbose=False)
    assert all(len(sequence) == 12 for sequence in seen)
    assert {i for sequence in seen for i in sequence} == set(ids)
    assert ids[-12:] in seen


def test_texts_are_joined_with_spaces(model, seen):
    model.train_tuned_lens(["w1 w2 w3", "w4", "", "w5 w6 w7 w8 w9 w10"], 1, max_seq_len=10, verbose=False)
    assert seen == [list(range(1, 11))]


@pytest.mark.parametrize(
    "dataset",
    [
        [list(range(5)), list(range(5, 10))],
        [tuple(range(10))],
        [mx.arange(4), mx.arange(4, 10)],
        [np.arange(10)],
        mx.arange(10)[None],
        [[], list(range(10)), []],
        "w0 w1 w2 w3 w4 w5 w6 w7 w8 w9",
    ],
    ids=["lists", "tuple", "arrays", "numpy", "one array", "some lists empty", "one text"],
)
def test_datasets_of_ids(model, seen, dataset):
    model.train_tuned_lens(dataset, 1, max_seq_len=10, verbose=False)
    assert seen == [list(range(10))]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "Dataset is empty"),
        ([""], "only empty or whitespace"),
        (["", "  \n\t"], "only empty or whitespace"),
        ("", "only empty or whitespace|Dataset is empty"),
        (["w1 w2 w3"], "Dataset too small: 3 tokens, need at least 12"),
        (["w1 w2 w3 w4 w5 w6", "w7 w8 w9 w10 w11"], "Dataset too small: 11 tokens, need at least 12. Provide more text"),
        ([[1, 2, 3]], "Dataset too small: 3 tokens"),
        ([[]], "Dataset too small: 0 tokens|Dataset is empty"),
        ([[*range(20), VOCAB]], r"Token id 100 is outside the model's vocabulary \(0 to 99\)"),
        ([[*range(20), -1]], "Token id -1 is outside"),
        ([f"w{VOCAB} " * 20], "Token id 100 is outside"),
    ],
)
def test_datasets_that_cannot_be_trained_on(model, dataset, message):
    with pytest.raises(ValueError, match=message):
        model.train_tuned_lens(dataset, **QUICK)


def test_datasets_of_floats(model):
    with pytest.raises(TypeError, match="integers"):
        model.train_tuned_lens([[0.5] * 20], **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 9}, r"max_seq_len \(9\) is too small. Must be at least 10 tokens"),
        ({"num_steps": -1}, "num_steps"),
        ({"momentum": 1.0}, "momentum"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"gradient_clip": -1.0}, "gradient_clip"),
    ],
)
def test_settings_out_of_range(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.train_tuned_lens(DATASET, **(QUICK | options))


def test_the_shortest_sequences(model):
    assert not identical(model.train_tuned_lens(DATASET, 1, max_seq_len=10, verbose=False))


def test_training_without_a_tokenizer(model):
    with pytest.raises(ValueError, match="No tokenizer available"):
        InterpretableModel(model.model).train_tuned_lens(DATASET, **QUICK)
    assert not identical(InterpretableModel(model.model).train_tuned_lens([IDS * 4], **QUICK))


@pytest.mark.parametrize("dataset", [DATASET, [IDS * 4]], ids=["texts", "ids"])
def test_training_without_a_head(dataset):
    class Headless(MockModel):
        def __init__(self):
            super().__init__()
            self.table, self.projection = self.embed_tokens, self.lm_head
            del self["embed_tokens"], self["lm_head"]

        def __call__(self, ids):
            x = self.table(ids)
            for layer in self.layers:
                x = layer(x)
            return self.projection(self.norm(x))

    with pytest.raises(ValueError, match="Could not find output projection.*lm_head_path"):
        InterpretableModel(Headless(), WordTokenizer()).train_tuned_lens(dataset, **QUICK)


def test_training_a_damaged_model(model):
    model.model.lm_head.weight = model.model.lm_head.weight * float("nan")
    with pytest.raises(ValueError, match="weights are damaged"):
        model.train_tuned_lens(DATASET, **QUICK)


def test_a_progress_bar_on_stderr_alone(model, capsys):
    model.train_tuned_lens(DATASET, **(QUICK | {"verbose": True}))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "KL" in shown.err
    model.train_tuned_lens(DATASET, **QUICK)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_steps_are_clipped(model):
    strict, loose = (model.train_tuned_lens(DATASET, 1, momentum=0.0, max_seq_len=12, gradient_clip=clip, verbose=False) for clip in (1e-3, 1e6))

    def distance(lens):
        return math.sqrt(sum(float(np.sum((np.array(t.weight) - np.eye(DIM)) ** 2) + np.sum(np.array(t.bias) ** 2)) for t in lens.translators))

    assert distance(strict) == pytest.approx(1e-3, rel=1e-2)  # learning rate 1, plain SGD
    assert distance(loose) > 2e-3


# ---------------------------------------------------------------- training: where the lens goes


def test_a_saved_lens_is_the_returned_one(model, tmp_path):
    lens = model.train_tuned_lens(DATASET, save_path=tmp_path / "a" / "mock-1.0", **QUICK)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["mock-1.0.json", "mock-1.0.npz"]
    for loaded in (model.load_tuned_lens(tmp_path / "a" / "mock-1.0"), TunedLens.load(str(tmp_path / "a" / "mock-1.0.npz"))):
        for x, y in zip(loaded.translators, lens.translators, strict=True):
            np.testing.assert_array_equal(np.array(x.weight), np.array(y.weight))
            np.testing.assert_array_equal(np.array(x.bias), np.array(y.bias))


@pytest.mark.parametrize("path", ["file/lens", "file/deeper/lens.npz", "folder", "folder2"])
def test_a_path_that_cannot_be_written_is_found_before_training(model, tmp_path, monkeypatch, path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "folder2.json").mkdir()
    monkeypatch.setattr(module, "train", lambda *args, **options: pytest.fail("training started"))
    with pytest.raises(OSError, match=r"Can't write .*Choose a path"):
        model.train_tuned_lens(DATASET, save_path=tmp_path / path, **QUICK)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder.npz", "folder2.json"]


def test_a_failed_training_leaves_an_older_lens(model, tmp_path):
    lens = random_lens()
    lens.save(tmp_path / "lens")

    def stop(step, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.train_tuned_lens(DATASET, save_path=tmp_path / "lens", callback=stop, **QUICK)
    np.testing.assert_array_equal(np.array(TunedLens.load(tmp_path / "lens").translators[0].weight), np.array(lens.translators[0].weight))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lens.json", "lens.npz"]


def test_a_lens_that_is_not_there(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="No lens at"):
        model.load_tuned_lens(tmp_path / "lens")
