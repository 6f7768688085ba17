"""A lens is found wherever one is asked for: a pair of files, a folder of tuned-lens, or a lens on the hub (a stub here)."""

import sys
import types

import mlx.core as mx
import numpy as np
import pytest

from metalens import InterpretableModel, TunedLens, evaluate, load_lens
from metalens.compat import tuned_lens as files
from metalens.lenses.lens import as_lens
from metalens.lenses.opening import files_read
from metalens.training.distributed import Group
from metalens.training.lens_exchange import shared_lens
from support.mocks import DIM, LAYERS, MockModel
from support.tuned_lens_files import assert_same_map, lens_of

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def lens():
    return lens_of({"embedding": True}, LAYERS, DIM)


@pytest.fixture
def places(lens, tmp_path, monkeypatch):
    """Names of one lens: a pair, a folder of tuned-lens and its file, and a lens on the hub."""
    lens.save(tmp_path / "pair")
    files.save(lens, tmp_path / "folder", "m")

    def hf_hub_download(repo_id, filename, *, subfolder, repo_type, revision, cache_dir):
        if (repo_id, repo_type, subfolder, revision) != ("AlignmentResearch/tuned-lens", "space", "lens/org/tiny", "v1"):
            raise RuntimeError("404 Client Error.")
        return str(tmp_path / "folder" / filename)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=hf_hub_download))
    monkeypatch.delenv("TUNED_LENS_REPO_ID", raising=False)
    monkeypatch.delenv("TUNED_LENS_REPO_TYPE", raising=False)
    return {
        "pair": tmp_path / "pair",
        "file of the pair": str(tmp_path / "pair.json"),
        "folder": tmp_path / "folder",
        "file of the folder": str(tmp_path / "folder" / "params.pt"),
        "hub": "hf:org/tiny@v1",
    }


@pytest.mark.parametrize("name", ["pair", "file of the pair", "folder", "file of the folder", "hub"])
def test_every_place_where_a_lens_is_asked_for(places, lens, name):
    model, place = InterpretableModel(MockModel()), places[name]
    for read in (TunedLens.load, load_lens, as_lens, model.load_tuned_lens, lambda path: shared_lens(path, Group())):
        found = read(place)
        assert_same_map(found, lens, 1e-7)
        for a, b in zip(found.dense("embedding"), lens.dense("embedding"), strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-7)
    expected = TunedLens.load(place)
    assert model.read(IDS, place).predictions == model.read(IDS, expected).predictions
    assert evaluate(model, IDS, place) == evaluate(model, IDS, expected)
    entropy = model.trajectory(mx.array(IDS), place, embedding=True).entropy
    np.testing.assert_array_equal(entropy, model.trajectory(IDS, expected, embedding=True).entropy)


def test_the_files_that_are_read(places, tmp_path):
    assert files_read(places["pair"]) == [tmp_path / "pair.npz", tmp_path / "pair.json"]
    assert files_read(places["file of the folder"]) == [tmp_path / "folder" / "params.pt", tmp_path / "folder" / "config.json"]
    assert files_read(places["hub"]) == []
    assert files_read(tmp_path / "none") == [tmp_path / "none.npz", tmp_path / "none.json"]


def test_a_lens_that_is_nowhere(places, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"neither none\.npz and none\.json, nor a folder with params\.pt and config\.json, nor a snapshot .*\. .* named hf:"
    ):
        TunedLens.load(tmp_path / "none")
    asked = r"^The hub's space AlignmentResearch/tuned-lens has no lens 'org/other' \(lens/org/other\), or can't be reached: 404"
    with pytest.raises(FileNotFoundError, match=asked):
        TunedLens.load("hf:org/other@v1")
