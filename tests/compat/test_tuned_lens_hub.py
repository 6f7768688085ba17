"""Lenses on the Hugging Face hub, which is a stub here: nothing in these tests may depend on a network."""

import sys
import types
from pathlib import Path

import pytest

from metalens import TunedLens
from metalens.compat import tuned_lens as files
from support.tuned_lens_files import DATA, assert_same_map, lens_of


@pytest.fixture
def hub(monkeypatch):
    """A stub of huggingface_hub that has one lens, and the list of what was asked of it."""
    asked = []

    def hf_hub_download(repo_id, filename, *, subfolder, repo_type, revision, cache_dir):
        asked.append((repo_id, repo_type, revision, subfolder, filename, cache_dir))
        if not subfolder.endswith("example/tiny"):
            raise RuntimeError("404 Client Error.\nEntry Not Found for url")
        return str(DATA / "zip-float32" / filename)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=hf_hub_download))
    monkeypatch.delenv("TUNED_LENS_REPO_ID", raising=False)
    monkeypatch.delenv("TUNED_LENS_REPO_TYPE", raising=False)
    return asked


def test_a_lens_on_the_hub(hub):
    assert_same_map(files.load("example/tiny"), files.load(DATA / "zip-float32"))
    assert hub == [
        ("AlignmentResearch/tuned-lens", "space", "main", "lens/example/tiny", "params.pt", None),
        ("AlignmentResearch/tuned-lens", "space", "main", "lens/example/tiny", "config.json", None),
    ]


def test_another_repository(hub, tmp_path, monkeypatch):
    files.load("example/tiny", "own/lenses", "dataset", "v2", "a/b", tmp_path)
    assert hub[0] == ("own/lenses", "dataset", "v2", "a/b/example/tiny", "params.pt", tmp_path)
    monkeypatch.setenv("TUNED_LENS_REPO_ID", "from/environment")
    monkeypatch.setenv("TUNED_LENS_REPO_TYPE", "model")
    files.load("example/tiny", subfolder="")
    assert hub[-1] == ("from/environment", "model", "main", "example/tiny", "config.json", None)


def test_a_folder_goes_before_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files.save(lens_of(), Path("example") / "tiny", "m")
    assert_same_map(files.load("example/tiny"), lens_of(), 1e-7)
    assert hub == []


def test_a_lens_that_is_nowhere(hub, monkeypatch):
    message = (
        r"No lens at 'org/none': it is no folder with params\.pt and config\.json, and 'lens/org/none' could not be downloaded from the hub's space "
        r"AlignmentResearch/tuned-lens: 404 Client Error\.$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        files.load("org/none")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="without huggingface_hub"):
        files.load("org/none")


def test_converting_from_the_hub_is_asked_for(hub, tmp_path):
    with pytest.raises(FileNotFoundError, match="neither"):
        files.convert("example/tiny", tmp_path / "x")
    assert hub == []
    files.convert("example/tiny", tmp_path / "x", hub=True)
    assert_same_map(TunedLens.load(tmp_path / "x"), files.load(DATA / "zip-float32"))


def test_the_hubs_own_function_takes_these_arguments():
    """The stub above is called as the real one can be."""
    import inspect

    hub = pytest.importorskip("huggingface_hub", reason="comes with mlx-lm")
    signature = inspect.signature(hub.hf_hub_download)
    signature.bind("repo", "file", subfolder="a", repo_type="space", revision="main", cache_dir=None)
