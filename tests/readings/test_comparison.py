"""Comparisons of trajectories: two lenses, two texts, two models, neighboring layers; and what cannot be compared."""

import json

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel
from metalens.readings import Trajectory, source
from support import oracle
from support.mocks import LAYERS, MockModel, WordTokenizer, random_lens, tiny_llama

IDS = [3, 1, 4, 1, 5, 9, 2]
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture
def model():
    return InterpretableModel(MockModel(), WordTokenizer())


def logits(model, ids, lens=None, hidden=None):
    """Return the logits [L, T, V] in float64 of what the lens makes of every block's output."""
    hidden = model.capture(ids).hidden
    return np.stack([oracle.wide(model.unembed(h[0] if lens is None else lens(h[0], i))) for i, h in enumerate(hidden)])


def assert_divergences(found, z_a, z_b):
    p, q = oracle.softmax(z_a), oracle.softmax(z_b)
    m = np.log((p + q) / 2)
    np.testing.assert_allclose(found.kl, oracle.kl(z_a, z_b), **CLOSE)
    np.testing.assert_allclose(found.reverse_kl, oracle.kl(z_b, z_a), **CLOSE)
    np.testing.assert_allclose(found.js, ((p * (np.log(p) - m)).sum(-1) + (q * (np.log(q) - m)).sum(-1)) / 2, **CLOSE)
    np.testing.assert_allclose(found.tv, np.abs(p - q).sum(-1) / 2, **CLOSE)


def test_two_lenses(model):
    lens = random_lens()
    found = model.trajectory(IDS, lens).compare(model.trajectory(IDS))
    assert_divergences(found, logits(model, IDS, lens), logits(model, IDS))
    assert (found.between, found.names, found.labels) == ("lenses", ("tuned lens", "logit lens"), ("layer 0", "layer 1", "layer 2"))
    assert repr(found) == "Comparison(lenses: tuned lens and logit lens, 3 rows x 7 positions)"


def test_two_texts(model):
    others = [3, 1, 4, 8, 5, 9, 2]
    found = model.trajectory(IDS).compare(model.trajectory(others))
    assert_divergences(found, logits(model, IDS), logits(model, others))
    assert found.between == "texts"
    assert np.abs(found.tv[:, :3]).max() < 1e-6  # nothing differs before the texts do
    assert found.tv[:, 3].min() > 1e-3


def test_positions_that_begin_elsewhere(model):
    a, b = model.trajectory(IDS).select(positions=slice(2, 5)), model.trajectory(IDS[:3])
    assert_divergences(a.compare(b), logits(model, IDS)[:, 2:5], logits(model, IDS[:3]))


def test_two_models_of_one_vocabulary(model):
    other = InterpretableModel(MockModel(dim=48, seed=3), WordTokenizer())
    found = model.trajectory(IDS).compare(other.trajectory(IDS))
    assert_divergences(found, logits(model, IDS), logits(other, IDS))
    assert (found.between, found.names) == ("models", ("model a", "model b"))


class Vocabulary(WordTokenizer):
    """A tokenizer that tells its vocabulary: 'w0', 'w1', ..., but for the words that were renamed."""

    def __init__(self, renamed):
        super().__init__()
        self.renamed = dict(renamed)

    def get_vocab(self):
        return {self.renamed.get(i, f"w{i}"): i for i in range(self.vocab_size)}


def test_two_models_of_one_size_and_two_vocabularies(model):
    def read(tokenizer, seed=3):
        return InterpretableModel(MockModel(seed=seed), tokenizer).trajectory(IDS)

    plain = read(Vocabulary({}))
    assert plain.compare(read(Vocabulary({50: "<chat>"}))).between == "models"  # models for chats rename special tokens
    swapped = {50: "w51", 51: "w50"}
    with pytest.raises(ValueError, match="token 50 is 'w50' in one model and 'w51' in the other, and 2 of 100 tokens differ"):
        plain.compare(read(Vocabulary(swapped)))
    other = WordTokenizer()  # it tells no vocabulary: the tokens that were read tell
    other.decode = lambda ids: " ".join(f"v{int(i)}" for i in ids)
    with pytest.raises(ValueError, match="in one model and 'v"):
        model.trajectory(IDS).compare(read(other))
    assert model.trajectory(IDS).compare(read(None)).kl.shape == (LAYERS, len(IDS))


def test_masks_differ_with_the_text(model):
    others = [3, 1, 4, 8, 5, 9, 2]
    found = model.trajectory(IDS, mask_input=True).compare(model.trajectory(others, mask_input=True))
    z_a, z_b = logits(model, IDS), logits(model, others)
    z_a[..., IDS], z_b[..., others] = -np.inf, -np.inf
    np.testing.assert_allclose(found.tv, np.abs(oracle.softmax(z_a) - oracle.softmax(z_b)).sum(-1) / 2, **CLOSE)
    assert np.isinf(found.kl).all()  # the text that has no 8 predicts one


def test_neighboring_layers(model):
    t = model.trajectory(IDS, embedding=True)
    found = t.compare_layers()
    z = logits(model, IDS)
    assert_divergences(t.select(layers=[0, 1, 2]).compare_layers(), z[:-1], z[1:])
    assert found.labels == ("embedding -> layer 0", "layer 0 -> layer 1", "layer 1 -> layer 2")
    assert found.kl.shape == (LAYERS, len(IDS))


def test_long_texts_in_parts(monkeypatch):
    llama = InterpretableModel(tiny_llama(), WordTokenizer(96))
    ids = np.random.default_rng(0).integers(0, 96, 50).tolist()
    a, b = llama.trajectory(ids), llama.trajectory(ids[::-1])
    whole, layers = a.compare(b), a.compare_layers()
    monkeypatch.setattr(source, "ROWS_BYTES", 1)
    for expected, found in ((whole, a.compare(b)), (layers, a.compare_layers())):
        for name, values in expected.to_numpy().items():
            np.testing.assert_allclose(getattr(found, name), values, rtol=1e-3, atol=1e-5)
    shifted = a.select(positions=slice(10, 40)).compare(b.select(positions=slice(3, 33)))
    z_a, z_b = (logits(llama, each) for each in (ids, ids[::-1]))
    assert_divergences(shifted, z_a[:, 10:40], z_b[:, 3:33])


def test_what_cannot_be_compared(model):
    t = model.trajectory(IDS)
    llama = InterpretableModel(tiny_llama(layers=3), WordTokenizer(96))
    for other, message in (
        (model.trajectory(IDS[:3]), "texts have 7 and 3 tokens. Give texts of equal length"),
        (model.trajectory(IDS, layers=[0]), "have 3 and 1 layers"),
        (llama.trajectory(IDS), "models have 100 and 96 tokens"),
        (Trajectory.from_json(t.to_json()), "read from a file"),
        (7, "not with int"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            t.compare(other)
    with pytest.raises(ValueError, match="two layers or more"):
        t.select(layers=[0]).compare_layers()
    broken = model.trajectory(IDS, lambda h, layer: h)
    broken.source.__dict__["lens"] = lambda h, layer: h * mx.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        t.compare(broken)


def test_as_json(model, tmp_path):
    found = model.trajectory(IDS).compare(model.trajectory(IDS, random_lens()))
    found.save(tmp_path / "c.json")
    data = json.loads((tmp_path / "c.json").read_text())
    assert len(data.pop("sha256")) == 64  # of the file alone
    assert data == found.to_json()
    assert (data["format"], data["between"], data["names"]) == ("metalens.comparison", "lenses", ["logit lens", "tuned lens"])
    assert Trajectory.from_json(data["b"]).lens == "tuned lens"
    layers = found.a.compare_layers().to_json()
    assert (layers["b"], [row["label"] for row in layers["layers"]]) == (None, ["layer 0 -> layer 1", "layer 1 -> layer 2"])
    assert found.to_json(trajectories=False)["a"] is None
