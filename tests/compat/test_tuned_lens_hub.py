"""Lenses on the Hugging Face hub, which is a stub here: nothing in these tests may depend on a network."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

from metalens import MetalensError, TunedLens
from metalens.cli import main
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


def test_a_name_with_a_revision(hub):
    assert_same_map(files.load("hf:example/tiny@v2"), files.load("example/tiny", revision="v2"))
    assert {asked[2:4] for asked in hub} == {("v2", "lens/example/tiny")}


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
    files.convert("hf:example/tiny", tmp_path / "x")
    assert_same_map(TunedLens.load(tmp_path / "x"), files.load(DATA / "zip-float32"))
    assert_same_map(files.load("hf:example/tiny"), files.load("example/tiny"), 0)
    with pytest.warns(DeprecationWarning, match="name the lens 'hf:example/tiny'"):
        files.convert("example/tiny", tmp_path / "y", hub=True)
    with pytest.warns(DeprecationWarning, match="is deprecated"):
        assert_same_map(files.load_lens("example/tiny", hub=True), TunedLens.load(tmp_path / "y"), 0)
    with pytest.warns(DeprecationWarning, match="is deprecated"), pytest.raises(FileNotFoundError, match="neither"):
        files.load_lens("example/tiny", hub=False)


def test_the_hubs_own_function_takes_these_arguments():
    """The stub above is called as the real one can be."""
    import inspect

    hub = pytest.importorskip("huggingface_hub", reason="comes with mlx-lm")
    signature = inspect.signature(hub.hf_hub_download)
    signature.bind("repo", "file", subfolder="a", repo_type="space", revision="main", cache_dir=None)


# ---------------------------------------------------------------- lists


def test_the_list_of_the_hub(monkeypatch):
    names = ["README.md", "lens/gpt2/params.pt", "lens/gpt2/config.json", "lens/org/b/config.json", "lens/org/b/params.pt", "lens/half/params.pt"]
    asked = []

    class Api:
        def list_repo_files(self, repo_id, *, repo_type, revision):
            asked.append((repo_id, repo_type, revision))
            return names if repo_id != "own/none" else 1 / 0

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=Api))
    monkeypatch.delenv("TUNED_LENS_REPO_ID", raising=False)
    monkeypatch.delenv("TUNED_LENS_REPO_TYPE", raising=False)
    assert files.available_lenses() == ["gpt2", "org/b"]
    assert files.available_lenses("own/lenses", "model", "v1", "") == ["lens/gpt2", "lens/org/b"]
    assert asked == [("AlignmentResearch/tuned-lens", "space", "main"), ("own/lenses", "model", "v1")]
    with pytest.raises(MetalensError, match=r"space own/none could not be listed: division by zero\. `cached_lenses`"):
        files.available_lenses("own/none")
    shown = CliRunner().invoke(main, ["lenses"])
    assert shown.stdout.split() == ["hf:gpt2", "hf:org/b"]
    assert json.loads(CliRunner().invoke(main, ["lenses", "--json"]).stdout) == {"lenses": ["gpt2", "org/b"]}
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MetalensError, match="pip install huggingface_hub"):
        files.available_lenses()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache as the hub's own package lays it out, with a lens in one of two snapshots, and half a lens in the other."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="comes with mlx-lm")
    root = tmp_path / "spaces--AlignmentResearch--tuned-lens"
    for commit, wanted in (("a" * 40, ("params.pt", "config.json")), ("b" * 40, ("params.pt",))):
        folder = root / "snapshots" / commit / "lens" / "org" / "tiny"
        folder.mkdir(parents=True)
        for name in wanted:
            (root / "blobs").mkdir(exist_ok=True)
            shutil.copy(DATA / "zip-float32" / name, root / "blobs" / name)
            (folder / name).symlink_to(root / "blobs" / name)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("TUNED_LENS_REPO_ID", raising=False)
    monkeypatch.delenv("TUNED_LENS_REPO_TYPE", raising=False)
    return tmp_path


def test_the_lenses_of_a_cache(cache):
    expected = cache / "spaces--AlignmentResearch--tuned-lens" / "snapshots" / ("a" * 40) / "lens" / "org" / "tiny"
    for found in (files.cached_lenses(), files.cached_lenses(cache_dir=cache)):
        assert found == [files.CachedLens("org/tiny", "a" * 40, expected, ("main",))]
    assert_same_map(TunedLens.load(expected), files.load(DATA / "zip-float32"))
    assert files.cached_lenses("own/lenses") == []
    shown = CliRunner().invoke(main, ["lenses", "--cached"]).stdout
    assert shown == f"hf:org/tiny@{'a' * 40} ({expected}, main)\n"


@pytest.mark.parametrize("name", ["hf:org/tiny", f"hf:org/tiny@{'a' * 40}"])
def test_the_hub_s_own_package_reads_a_cached_lens_without_a_network(cache, name):
    assert_same_map(TunedLens.load(name), files.load(DATA / "zip-float32"))


def test_a_lens_that_is_not_in_the_cache(cache):
    with pytest.raises(FileNotFoundError, match="has no lens 'org/other' .lens/org/other., or can't be reached"):
        TunedLens.load("hf:org/other")
