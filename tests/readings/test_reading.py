import json
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel
from metalens.readings import TopToken
from support.mocks import LAYERS, VOCAB, MockModel, WordTokenizer, random_lens

TEXT = "w3 w1 w4 w1 w5"


@pytest.fixture
def model():
    return InterpretableModel(MockModel(), WordTokenizer())


@pytest.fixture
def reading(model):
    """Two of three layers, in falling order, and the top three tokens."""
    return model.read(TEXT, random_lens(), top_k=3, layers=[2, 0])


def test_the_text_form_is_one_short_line(model, reading):
    assert repr(reading) == "Reading(tuned lens, 2 of 3 layers, 5 tokens: 'w3w1w4w1w5')"
    assert repr(model.read([1] * 50)).endswith("50 tokens: 'w1w1w1w1w1w1w1w1w1w1w1w1w1w1w1w1w1w1w...')")
    assert repr(model.read([1])).startswith("Reading(logit lens, 3 of 3 layers, 1 token:")
    assert model.read([1], lambda h, layer: h).lens == "<lambda>"


def test_tokens_and_their_ids(model, reading):
    assert (reading.tokens, reading.token_ids) == (TEXT.split(), [3, 1, 4, 1, 5])
    assert model.read(TEXT, position=2).token_ids == [4]


def test_top_takes_numbers_of_layers(reading):
    for layer, row in ((2, 0), (-1, 0), (0, 1), (-LAYERS, 1)):
        for position in (0, 4, -1, -5):
            found = reading.top(layer, position)
            logits, lse = np.array(reading.stats.top_logits)[row, position], np.array(reading.stats.lse)[row, position]
            assert [(t.id, t.logit, t.token) for t in found] == reading.predictions[2 if row == 0 else 0][position]
            np.testing.assert_allclose([t.probability for t in found], np.exp(logits - lse), rtol=1e-6)
    assert reading.top(2) == reading.top(2, -1)
    assert isinstance(found[0], TopToken)
    assert [type(value) for value in found[0]] == [int, float, float, str]


def test_probabilities_are_those_of_the_softmax(model):
    reading = model.read(TEXT, top_k=VOCAB)
    np.testing.assert_allclose(np.array(reading.probabilities).sum(-1), np.ones((LAYERS, 5)), rtol=1e-5)
    np.testing.assert_allclose(np.array(reading.probabilities)[..., 0], np.array(reading.stats.max_probability), rtol=1e-5)


def test_statistics_of_one_layer(reading):
    for layer, row in ((2, 0), (0, 1), (-3, 1)):
        stats = reading.at_layer(layer)
        np.testing.assert_array_equal(np.array(stats.entropy), np.array(reading.stats.entropy)[row])
        assert (stats.top_ids.shape, stats.kl) == ((5, 3), None)


@pytest.mark.parametrize("layer", [1, -2, 3, -4])
def test_layers_that_were_not_read(reading, layer):
    for ask in (reading.top, reading.at_layer, reading.row):
        with pytest.raises(ValueError, match=f"Layer {layer} was not read; this reading has layers 2, 0"):
            ask(layer)


@pytest.mark.parametrize("position", [5, -6])
def test_positions_that_were_not_read(reading, position):
    with pytest.raises(ValueError, match=rf"Position {position} is out of bounds for sequence length 5"):
        reading.top(0, position)


def test_the_dictionary_is_json(reading):
    data = reading.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data.keys() == {"lens", "num_layers", "tokens", "token_ids", "layers", "model"}
    assert (data["lens"], data["num_layers"], data["tokens"]) == ("tuned lens", LAYERS, TEXT.split())
    assert [entry["layer"] for entry in data["layers"]] == [2, 0]
    for entry in data["layers"]:
        assert entry["top"] == [[best._asdict() for best in reading.top(entry["layer"], position)] for position in range(5)]
        assert entry["entropy"] == reading.at_layer(entry["layer"]).entropy.tolist()
    assert data["model"]["tokens"] == reading.model_tokens
    assert data["model"]["entropy"] == reading.model.entropy[0].tolist()


def test_a_table_for_pandas(reading, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=SimpleNamespace(from_records=list)))
    records = reading.to_pandas()
    assert len(records) == 2 * 5 * 3
    best = reading.top(0, 1)[2]
    assert records[3 * 5 + 3 * 1 + 2] == {
        "layer": 0, "translated": True, "position": 1, "token": "w1", "rank": 3, "id": best.id, "prediction": best.token,
        "probability": best.probability, "logit": best.logit, "entropy": reading.at_layer(0).entropy[1].item(),
    }  # fmt: skip


def test_without_pandas(reading, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        reading.to_pandas()


@pytest.mark.parametrize(("color", "name", "limits"), [("probability", "probability of the top token", (0, 1)), ("entropy", "entropy (nats)", None)])
def test_the_picture(reading, color, name, limits):
    figure = reading.plot(color, title="a title")
    axes, bar = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 0", "layer 2", "model"]
    values = np.array(reading.stats.max_probability if color == "probability" else reading.stats.entropy)
    of_model = np.array(reading.model.max_probability if color == "probability" else reading.model.entropy)
    np.testing.assert_allclose(axes.images[0].get_array(), np.vstack([values[::-1], of_model]), rtol=1e-6)
    assert (axes.get_title(), bar.get_ylabel()) == ("a title", name)
    assert limits is None or axes.images[0].get_clim() == limits
    assert reading.plot(color, max_display_tokens=2, cmap="magma").axes[0].images[0].get_array().shape == (3, 2)


def test_the_color_is_one_of_two(reading):
    with pytest.raises(ValueError, match="'probability' or 'entropy', not 'kl'"):
        reading.plot("kl")


def test_the_picture_as_a_file(reading, tmp_path):
    reading.save(tmp_path / "new" / "picture.png", color="entropy", title="t")
    assert (tmp_path / "new" / "picture.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="suffix must be one of"):
        reading.save(tmp_path / "picture.doc")


def test_a_batch_as_an_array_is_read_in_row_0(model):
    batch = mx.array([[3, 1, 4], [9, 9, 9]])
    assert model.read(batch).to_dict() == model.read([3, 1, 4]).to_dict()


def test_the_embedding_is_a_layer(model):
    lens = random_lens()
    trajectory = model.trajectory(TEXT, lens, embedding=True, top_k=3)
    reading = model.read(TEXT, lens, top_k=3, embedding=True)
    assert reading.layers == ["embedding", 0, 1, 2] == list(reading.predictions)
    assert reading.untranslated == ("embedding",)  # this lens has no translator for it
    np.testing.assert_allclose(np.array(reading.stats.entropy), trajectory.entropy, rtol=1e-6)
    assert [t.id for t in reading.top("embedding", 1)] == trajectory.top_ids[0, 1].tolist()
    assert (reading.row("embedding"), reading.row(-1)) == (0, 3)
    assert reading.to_dict()["layers"][0].items() >= {"layer": "embedding", "translated": False}.items()
    labels = [label.get_text() for label in reading.plot().axes[0].get_yticklabels()]
    assert labels == ["embedding*", "layer 0", "layer 1", "layer 2", "model"]
    with pytest.raises(ValueError, match="Layer embedding was not read"):
        model.read(TEXT).row("embedding")
