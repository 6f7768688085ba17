import warnings

import matplotlib as mpl
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metalens import InterpretableModel, TunedLens
from support.mocks import DIM, LAYERS, VOCAB, MockModel, WordTokenizer, assert_close, float64_logits, random_lens, tiny_llama

TEXT = "w3 w1 w4 w1 w5"
IDS = [3, 1, 4, 1, 5]


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


def expected_predictions(logits, top_k, layers=range(LAYERS)):
    """From float64 logits [T, V] per layer: the documented form."""

    def best(row):
        return [(int(i), row[i], f"w{i}") for i in np.argsort(-row, kind="stable")[:top_k]]

    return {layer: [best(row) for row in logits[layer]] for layer in layers}


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


def test_tied_quantized_heads_name_every_row_whatever_the_tokenizer_says():
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


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_the_last_row_of_a_16_bit_model_is_the_models_own(dtype):
    """Of the logit lens to the last bit. A tuned lens rounds otherwise: it may name another token only where the two are nearly equal."""
    llama = tiny_llama()
    llama.set_dtype(dtype)
    model, ids = InterpretableModel(llama), list(range(1, 60))
    logit, tuned = (model.trajectory(ids, lens, layers=[-1]) for lens in (None, TunedLens(2, 64)))
    for name in ("top_ids", "entropy", "max_probability", "cross_entropy"):
        np.testing.assert_array_equal(getattr(logit, name)[0], getattr(logit.model, name)[0])
    assert not logit.kl.any()
    assert np.abs(tuned.kl).max() < 1e-5
    row = np.array(llama(mx.array([ids])).astype(mx.float32))[0]
    chosen = np.take_along_axis(row, tuned.top_ids[0, :, :1], axis=1)[:, 0]
    assert (row.max(axis=1) - chosen <= 0.02 * np.abs(row).max(axis=1)).all()


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


def test_norms_in_place_of_a_models_own_do_not_spare_it_the_check():
    """The head is checked with the model's own norm; `norm` is the way out where that is not found."""
    model = InterpretableModel(tiny_llama(), norm_path="model.layers.0.input_layernorm")
    for options in ({}, {"skip_norm": True}, {"final_norm": model.model.model.norm}):
        with pytest.raises(ValueError, match="Pass norm=, head= or logit_transform="):
            model.logit_lens(IDS, **options)
    assert list(InterpretableModel(model.model, norm=model.model.model.norm).logit_lens(IDS, skip_norm=True)) == [0, 1]


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


@pytest.mark.parametrize("layers", [[LAYERS], [-LAYERS - 1], [0, 17]])
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
        model.tuned_lens(TEXT, 3)


def test_a_lens_may_be_given_by_its_path(model, tmp_path):
    lens = random_lens()
    lens.save(tmp_path / "lens")
    expected = model.tuned_lens(TEXT, lens)
    assert model.tuned_lens(TEXT, tmp_path / "lens") == expected
    assert model.tuned_lens(TEXT, str(tmp_path / "lens.npz")) == expected
    assert model.read(TEXT, lens=str(tmp_path / "lens")).predictions == expected
    with pytest.raises(FileNotFoundError, match="No lens at"):
        model.tuned_lens(TEXT, "no such lens")


# ---------------------------------------------------------------- negative layers, several texts


def test_negative_layers(model):
    everything = model.logit_lens(TEXT)
    assert_close(model.logit_lens(TEXT, layers=[-1, 0]), {LAYERS - 1: everything[LAYERS - 1], 0: everything[0]})
    assert model.read(TEXT, layers=[-1]).layers == [LAYERS - 1]


@pytest.mark.parametrize("lens", [None, random_lens()], ids=["logit", "tuned"])
@pytest.mark.parametrize(
    "texts",
    [[TEXT, "w7", "w9 w2 w2"], (TEXT, "w7"), [IDS, [7]], [mx.array(IDS), np.array([7, 7])], [TEXT]],
    ids=["strings", "tuple", "lists of ids", "arrays", "one text"],
)
def test_several_texts_are_read_as_each_alone(model, lens, texts):
    readings = model.read(texts, lens, top_k=2, position=-1)
    assert len(readings) == len(texts)
    for reading, text in zip(readings, texts, strict=True):
        alone = model.read(text, lens, top_k=2, position=-1)
        assert reading.to_dict() == alone.to_dict()
    found = model.logit_lens(texts, top_k=2) if lens is None else model.tuned_lens(texts, lens, top_k=2)
    assert found == [each.predictions for each in model.read(texts, lens, top_k=2)]


def test_several_texts_without_layers(model):
    assert model.logit_lens([TEXT, "w7"], layers=[]) == [{}, {}]


def test_every_one_of_several_texts_is_shown(model, pictures):
    found = model.logit_lens([TEXT, "w7"], plot=True, figsize=(3, 2))
    assert found == model.logit_lens([TEXT, "w7"])
    assert len(pictures) == 2


def test_an_empty_text_among_several(model):
    with pytest.raises(ValueError, match="no tokens in the input"):
        model.read([TEXT, ""])


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
